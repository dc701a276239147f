//! `warren.v1.FunctionService`: what people and programs ask for.

use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::function_service_server::FunctionService;
use warren_proto::v1::{
    CreateTriggerRequest, CreateTriggerResponse, DeleteAliasRequest, DeleteAliasResponse,
    DeleteFunctionRequest, DeleteFunctionResponse, DeleteTriggerRequest, DeleteTriggerResponse,
    DeployFunctionRequest, DeployFunctionResponse, GetFunctionRequest, GetFunctionResponse,
    ListFunctionsRequest, ListFunctionsResponse, ListTriggersRequest, ListTriggersResponse,
    RollBackAliasRequest, RollBackAliasResponse, SetAliasRequest, SetAliasResponse,
};

use super::publish::{Deployed, Publisher};
use crate::functions;
use crate::store::Store;

/// The longest message: the first one of a deployment has the function's files.
pub const MAX_MESSAGE: usize = 16 << 20;

/// The service.
pub struct FunctionApi {
    store: Arc<dyn Store>,
    publisher: Arc<Publisher>,
}

impl FunctionApi {
    /// The API over these parts.
    pub fn new(store: Arc<dyn Store>, publisher: Arc<Publisher>) -> Self {
        Self { store, publisher }
    }
}

#[tonic::async_trait]
impl FunctionService for FunctionApi {
    async fn deploy_function(
        &self,
        request: Request<Streaming<DeployFunctionRequest>>,
    ) -> Result<Response<DeployFunctionResponse>, Status> {
        let Deployed { function, version, compiled_before, zones_left_out } =
            self.publisher.deploy(request.into_inner()).await?;
        let function = Some((&function).into());
        let deployed =
            DeployFunctionResponse { function, version, compiled_before, zones_left_out };
        Ok(Response::new(deployed))
    }

    async fn list_functions(
        &self,
        request: Request<ListFunctionsRequest>,
    ) -> Result<Response<ListFunctionsResponse>, Status> {
        let functions = functions::list(&*self.store, &request.into_inner().vpc).await?;
        let functions = functions.iter().map(Into::into).collect();
        Ok(Response::new(ListFunctionsResponse { functions }))
    }

    async fn get_function(
        &self,
        request: Request<GetFunctionRequest>,
    ) -> Result<Response<GetFunctionResponse>, Status> {
        let function = functions::get(&*self.store, &request.into_inner().name).await?;
        Ok(Response::new(GetFunctionResponse { function: Some((&function).into()) }))
    }

    async fn delete_function(
        &self,
        request: Request<DeleteFunctionRequest>,
    ) -> Result<Response<DeleteFunctionResponse>, Status> {
        functions::delete(&*self.store, &request.into_inner().name).await?;
        Ok(Response::new(DeleteFunctionResponse {}))
    }

    async fn set_alias(
        &self,
        request: Request<SetAliasRequest>,
    ) -> Result<Response<SetAliasResponse>, Status> {
        let SetAliasRequest { function, alias } = request.into_inner();
        let alias = alias.ok_or_else(|| Status::invalid_argument("alias: is missing"))?;
        let function =
            functions::set_alias(&*self.store, &function, &alias.name, &alias.versions).await?;
        Ok(Response::new(SetAliasResponse { alias: function.alias_message(&alias.name) }))
    }

    async fn roll_back_alias(
        &self,
        request: Request<RollBackAliasRequest>,
    ) -> Result<Response<RollBackAliasResponse>, Status> {
        let RollBackAliasRequest { function, alias } = request.into_inner();
        let function = functions::roll_back(&*self.store, &function, &alias).await?;
        Ok(Response::new(RollBackAliasResponse { alias: function.alias_message(&alias) }))
    }

    async fn delete_alias(
        &self,
        request: Request<DeleteAliasRequest>,
    ) -> Result<Response<DeleteAliasResponse>, Status> {
        let DeleteAliasRequest { function, alias } = request.into_inner();
        functions::delete_alias(&*self.store, &function, &alias).await?;
        Ok(Response::new(DeleteAliasResponse {}))
    }

    async fn create_trigger(
        &self,
        request: Request<CreateTriggerRequest>,
    ) -> Result<Response<CreateTriggerResponse>, Status> {
        let trigger = request.into_inner().trigger;
        let trigger = trigger.ok_or_else(|| Status::invalid_argument("trigger: is missing"))?;
        let trigger = functions::create_trigger(&*self.store, trigger).await?;
        Ok(Response::new(CreateTriggerResponse { trigger: Some((&trigger).into()) }))
    }

    async fn list_triggers(
        &self,
        request: Request<ListTriggersRequest>,
    ) -> Result<Response<ListTriggersResponse>, Status> {
        let triggers =
            functions::list_triggers(&*self.store, &request.into_inner().function).await?;
        let triggers = triggers.iter().map(Into::into).collect();
        Ok(Response::new(ListTriggersResponse { triggers }))
    }

    async fn delete_trigger(
        &self,
        request: Request<DeleteTriggerRequest>,
    ) -> Result<Response<DeleteTriggerResponse>, Status> {
        functions::delete_trigger(&*self.store, &request.into_inner().name).await?;
        Ok(Response::new(DeleteTriggerResponse {}))
    }
}
