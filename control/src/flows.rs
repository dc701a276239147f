//! Flows of the fleet, and who had a port: asked of all hosts at once.

use warren_proto::v1;

use crate::ask::{Answer, Unknown, Whom, ask};
use crate::fleet::{Fleet, InstanceError, Role};
use crate::store::{Store, StoreError};
use crate::vpc;

/// Why flows cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    /// No such host.
    #[error(transparent)]
    Host(#[from] Unknown),
    /// No such VPC.
    #[error("there is no VPC \"{0}\": `warren vpc ls` lists them")]
    Vpc(String),
    /// No such instance.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

async fn check_vpc(store: &dyn Store, name: &str) -> Result<(), FlowsError> {
    if vpc::list(store).await?.iter().any(|vpc| vpc.name == name) {
        Ok(())
    } else {
        Err(FlowsError::Vpc(name.to_owned()))
    }
}

/// The flows in hosts' tables.
pub async fn list(
    store: &dyn Store,
    fleet: &Fleet,
    request: v1::ListFleetFlowsRequest,
) -> Result<Vec<v1::HostFlows>, FlowsError> {
    let v1::ListFleetFlowsRequest { mut host, vpc, instance, limit } = request;
    if !vpc.is_empty() {
        check_vpc(store, &vpc).await?;
    }
    if !instance.is_empty() && host.is_empty() {
        // Nobody else has flows of it.
        (host, _) = fleet.host_of(&instance)?;
    }
    let question = v1::ListFlowsRequest { vpc, instance, limit };
    let answers = ask(fleet, Whom::new(Some(Role::Host), &host), |mut agent| {
        let question = question.clone();
        async move { agent.list_flows(question).await }
    });
    let told = answers.await?.into_iter().map(|Answer { host, answer, .. }| {
        let (v1::ListFlowsResponse { flows, total }, problem) = or_problem(answer);
        v1::HostFlows { host, flows, total, problem }
    });
    Ok(told.collect())
}

/// Who had a port.
pub async fn find_mappings(
    store: &dyn Store,
    fleet: &Fleet,
    host: &str,
    query: v1::FindMappingsRequest,
) -> Result<Vec<v1::HostMappings>, FlowsError> {
    check_vpc(store, &query.vpc).await?;
    let answers = ask(fleet, Whom::new(Some(Role::Host), host), |mut agent| {
        let query = query.clone();
        async move { agent.find_mappings(query).await }
    });
    let told = answers.await?.into_iter().map(|Answer { host, answer, .. }| {
        let (found, problem) = or_problem(answer);
        v1::HostMappings { host, found: Some(found), problem }
    });
    Ok(told.collect())
}

fn or_problem<T: Default>(answer: Result<T, String>) -> (T, String) {
    match answer {
        Ok(answer) => (answer, String::new()),
        Err(problem) => (T::default(), problem),
    }
}
