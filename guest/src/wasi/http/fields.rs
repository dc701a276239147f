//! Header fields and trailers.

use alloc::string::String;
use alloc::vec::Vec;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::State;
use super::super::bindings::wasi::http::types::{self, HeaderError};
use crate::http::head::{is_name, is_value};
use crate::http::{Fields, is_of_the_connection, values};

/// The most that the fields of one message have together, in bytes.
const BYTES_MAX: usize = 64 * 1024;

/// Fields, which can be changed until a message has them.
pub struct HttpFields {
    pub fields: Fields,
    pub is_fixed: bool,
}

impl HttpFields {
    pub fn fixed(fields: Fields) -> Self {
        Self { fields, is_fixed: true }
    }

    /// Whether a field can be added.
    fn check(&self, name: &str, value: &[u8]) -> Result<(), HeaderError> {
        let length = |(name, value): &(String, Vec<u8>)| name.len() + value.len();
        let all: usize = self.fields.iter().map(length).sum();
        match () {
            () if self.is_fixed => Err(HeaderError::Immutable),
            () if !is_name(name) || !is_value(value) => Err(HeaderError::InvalidSyntax),
            () if is_of_the_connection(name) || all + name.len() + value.len() > BYTES_MAX => {
                Err(HeaderError::Forbidden)
            }
            () => Ok(()),
        }
    }

    fn remove(&mut self, name: &str) {
        self.fields.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
    }
}

impl types::HostFields for State {
    fn new(&mut self) -> Result<Resource<HttpFields>> {
        Ok(self.table.push(HttpFields { fields: Fields::new(), is_fixed: false })?)
    }

    fn from_list(
        &mut self,
        entries: Vec<(String, Vec<u8>)>,
    ) -> Result<Result<Resource<HttpFields>, HeaderError>> {
        let mut fields = HttpFields { fields: Fields::new(), is_fixed: false };
        for (name, value) in entries {
            if let Err(error) = fields.check(&name, &value) {
                return Ok(Err(error));
            }
            fields.fields.push((name, value));
        }
        Ok(Ok(self.table.push(fields)?))
    }

    fn get(&mut self, fields: Resource<HttpFields>, name: String) -> Result<Vec<Vec<u8>>> {
        let fields = &self.table.get(&fields)?.fields;
        Ok(values(fields, &name).map(<[u8]>::to_vec).collect())
    }

    fn has(&mut self, fields: Resource<HttpFields>, name: String) -> Result<bool> {
        Ok(values(&self.table.get(&fields)?.fields, &name).next().is_some())
    }

    fn set(
        &mut self,
        fields: Resource<HttpFields>,
        name: String,
        values: Vec<Vec<u8>>,
    ) -> Result<Result<(), HeaderError>> {
        let fields = self.table.get_mut(&fields)?;
        let checked = values.iter().try_for_each(|value| fields.check(&name, value));
        Ok(checked.map(|()| {
            fields.remove(&name);
            fields.fields.extend(values.into_iter().map(|value| (name.clone(), value)));
        }))
    }

    fn delete(
        &mut self,
        fields: Resource<HttpFields>,
        name: String,
    ) -> Result<Result<(), HeaderError>> {
        let fields = self.table.get_mut(&fields)?;
        Ok(fields.check(&name, b"").map(|()| fields.remove(&name)))
    }

    fn append(
        &mut self,
        fields: Resource<HttpFields>,
        name: String,
        value: Vec<u8>,
    ) -> Result<Result<(), HeaderError>> {
        let fields = self.table.get_mut(&fields)?;
        Ok(fields.check(&name, &value).map(|()| fields.fields.push((name, value))))
    }

    fn entries(&mut self, fields: Resource<HttpFields>) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(self.table.get(&fields)?.fields.clone())
    }

    fn clone(&mut self, fields: Resource<HttpFields>) -> Result<Resource<HttpFields>> {
        let fields = self.table.get(&fields)?.fields.clone();
        Ok(self.table.push(HttpFields { fields, is_fixed: false })?)
    }

    fn drop(&mut self, fields: Resource<HttpFields>) -> Result<()> {
        self.table.delete(fields)?;
        Ok(())
    }
}
