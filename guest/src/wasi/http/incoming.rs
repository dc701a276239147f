//! The call that a function answers.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use core::cell::RefCell;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::State;
use super::super::bindings::wasi::http::types::{self, ErrorCode, Method, Scheme};
use super::body::{SharedBody, Target};
use super::{HttpFields, IncomingBody, OutgoingBody, Shared, method};
use crate::http::head::Request;
use crate::http::server::Answer;
use crate::http::values;
use crate::single::Single;

/// A request that came.
pub struct IncomingRequest {
    head: Request,
    body: Option<Single<SharedBody>>,
}

impl IncomingRequest {
    pub fn new(head: Request, body: SharedBody) -> Self {
        Self { head, body: Some(Single(body)) }
    }
}

/// Where the answer goes, once.
pub struct ResponseOutparam(pub Shared<Answer>);

/// An answer that is put together.
pub struct OutgoingResponse {
    status: u16,
    fields: HttpFields,
    body: Single<Rc<RefCell<Target>>>,
    /// Somebody has the body.
    is_taken: bool,
}

impl types::HostIncomingRequest for State {
    fn method(&mut self, request: Resource<IncomingRequest>) -> Result<Method> {
        Ok(method(&self.table.get(&request)?.head.method))
    }

    fn path_with_query(&mut self, request: Resource<IncomingRequest>) -> Result<Option<String>> {
        Ok(Some(self.table.get(&request)?.head.target.clone()))
    }

    fn scheme(&mut self, request: Resource<IncomingRequest>) -> Result<Option<Scheme>> {
        let fields = &self.table.get(&request)?.head.fields;
        let is_https = values(fields, "x-forwarded-proto").any(|value| value == b"https");
        Ok(Some(if is_https { Scheme::Https } else { Scheme::Http }))
    }

    fn authority(&mut self, request: Resource<IncomingRequest>) -> Result<Option<String>> {
        let host = values(&self.table.get(&request)?.head.fields, "host").next();
        Ok(host.and_then(|host| String::from_utf8(host.to_vec()).ok()))
    }

    fn headers(&mut self, request: Resource<IncomingRequest>) -> Result<Resource<HttpFields>> {
        let fields = self.table.get(&request)?.head.fields.clone();
        Ok(self.table.push(HttpFields::fixed(fields))?)
    }

    fn consume(
        &mut self,
        request: Resource<IncomingRequest>,
    ) -> Result<Result<Resource<IncomingBody>, ()>> {
        let Some(Single(body)) = self.table.get_mut(&request)?.body.take() else {
            return Ok(Err(()));
        };
        Ok(Ok(self.table.push(IncomingBody::new(body))?))
    }

    fn drop(&mut self, request: Resource<IncomingRequest>) -> Result<()> {
        self.table.delete(request)?;
        Ok(())
    }
}

impl types::HostResponseOutparam for State {
    fn set(
        &mut self,
        param: Resource<ResponseOutparam>,
        response: Result<Resource<OutgoingResponse>, ErrorCode>,
    ) -> Result<()> {
        let Single(answer) = self.table.delete(param)?.0;
        match response {
            Ok(response) => {
                let response = self.table.delete(response)?;
                answer.borrow_mut().begin(response.status, response.fields.fields);
                let mut target = response.body.0.borrow_mut();
                if !response.is_taken {
                    *target = Target::Waiting(alloc::vec![], Some(alloc::vec![]));
                }
                // What is wrong with the answer the caller is told by its being cut.
                if target.attach_to_answer(&mut self.machine, &answer).is_err() {
                    answer.borrow_mut().break_off(&mut self.machine);
                }
            }
            Err(error) => {
                let text = format!("{error:?}");
                answer.borrow_mut().refuse(&mut self.machine, 500, "function", &text);
            }
        }
        Ok(())
    }

    fn drop(&mut self, param: Resource<ResponseOutparam>) -> Result<()> {
        self.table.delete(param)?;
        Ok(())
    }
}

impl types::HostOutgoingResponse for State {
    fn new(&mut self, fields: Resource<HttpFields>) -> Result<Resource<OutgoingResponse>> {
        let fields = HttpFields::fixed(self.table.delete(fields)?.fields);
        let body = Single(Rc::default());
        Ok(self.table.push(OutgoingResponse { status: 200, fields, body, is_taken: false })?)
    }

    fn status_code(&mut self, response: Resource<OutgoingResponse>) -> Result<u16> {
        Ok(self.table.get(&response)?.status)
    }

    fn set_status_code(
        &mut self,
        response: Resource<OutgoingResponse>,
        status: u16,
    ) -> Result<Result<(), ()>> {
        if !(200..=599).contains(&status) {
            return Ok(Err(()));
        }
        self.table.get_mut(&response)?.status = status;
        Ok(Ok(()))
    }

    fn headers(&mut self, response: Resource<OutgoingResponse>) -> Result<Resource<HttpFields>> {
        let fields = self.table.get(&response)?.fields.fields.clone();
        Ok(self.table.push(HttpFields::fixed(fields))?)
    }

    fn body(
        &mut self,
        response: Resource<OutgoingResponse>,
    ) -> Result<Result<Resource<OutgoingBody>, ()>> {
        let response = self.table.get_mut(&response)?;
        if core::mem::replace(&mut response.is_taken, true) {
            return Ok(Err(()));
        }
        let body = OutgoingBody::new(response.body.0.clone());
        Ok(Ok(self.table.push(body)?))
    }

    fn drop(&mut self, response: Resource<OutgoingResponse>) -> Result<()> {
        self.table.delete(response)?;
        Ok(())
    }
}
