//! Route tables of VPCs: how they are kept and changed.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;
use warren_proto::route::{InvalidRoute, InvalidTable, Route, Table, Target, parse_prefix};
use warren_proto::v1;

use crate::store::{Precondition, Store, StoreError, Write, decode};
use crate::vpc::{self, Vpc};

/// Where a VPC's table is stored, whole, so that it changes whole: `routes/VPC`.
pub const ROUTES_PREFIX: &str = "routes/";

/// Why a table was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RoutesError {
    /// Never created.
    #[error("there is no VPC \"{0}\": `warren vpc ls` lists them")]
    UnknownVpc(String),
    /// A route is none.
    #[error(transparent)]
    Route(#[from] InvalidRoute),
    /// The routes together are no table.
    #[error(transparent)]
    Table(#[from] InvalidTable),
    /// The prefix is taken.
    #[error("VPC \"{vpc}\" has the route {present} already: delete it first")]
    Exists {
        /// VPC.
        vpc: String,
        /// The route that is there.
        present: Route,
    },
    /// Nothing to delete.
    #[error(
        "the table of VPC \"{vpc}\" has no route to {prefix}: `warren route list {vpc}` lists it; \
         what is of the VPC's CIDR or gateway can be overruled, not deleted"
    )]
    NoRoute {
        /// VPC.
        vpc: String,
        /// Of the route.
        prefix: IpNetwork,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The routes that are in force in a VPC.
pub struct Listed {
    /// Its table, in the order of the prefixes.
    pub routes: Vec<Route>,
    /// Those of its CIDR and gateway that the table does not overrule.
    pub defaults: Vec<Route>,
}

/// The routes of a VPC.
pub async fn list(store: &dyn Store, vpc: &str) -> Result<Listed, RoutesError> {
    let definition = known(store, vpc).await?;
    let key = key(vpc);
    let routes: Vec<Route> = match store.get(&key).await? {
        Some(entry) => decode(&key, &entry.value)?,
        None => Vec::new(),
    };
    let mut defaults = definition.defaults();
    defaults.retain(|default| routes.iter().all(|route| route.prefix != default.prefix));
    Ok(Listed { routes, defaults })
}

/// Adds routes, all or none. Those that are there already stay.
pub async fn add(store: &dyn Store, vpc: &str, added: &[v1::Route]) -> Result<(), RoutesError> {
    let added = parse(added)?;
    change(store, vpc, |mut table| {
        for &Route { prefix, target } in &added {
            match table.insert(prefix, target) {
                Some(present) if present != target => {
                    let present = Route { prefix, target: present };
                    return Err(RoutesError::Exists { vpc: vpc.to_owned(), present });
                }
                _ => {}
            }
        }
        Ok(routes(table))
    })
    .await
}

/// Deletes the routes of these prefixes, all or none.
pub async fn delete(store: &dyn Store, vpc: &str, prefixes: &[String]) -> Result<(), RoutesError> {
    let prefixes: Vec<_> =
        prefixes.iter().map(|prefix| parse_prefix(prefix)).collect::<Result<_, _>>()?;
    change(store, vpc, |mut table| {
        for &prefix in &prefixes {
            if table.remove(&prefix).is_none() {
                return Err(RoutesError::NoRoute { vpc: vpc.to_owned(), prefix });
            }
        }
        Ok(routes(table))
    })
    .await
}

/// Makes these routes the whole table.
pub async fn replace(store: &dyn Store, vpc: &str, all: &[v1::Route]) -> Result<(), RoutesError> {
    let mut all = parse(all)?;
    all.sort_by_key(|route| route.prefix);
    change(store, vpc, |_| Ok(all.clone())).await
}

fn key(vpc: &str) -> String {
    format!("{ROUTES_PREFIX}{vpc}")
}

async fn known(store: &dyn Store, vpc: &str) -> Result<Vpc, RoutesError> {
    vpc::get(store, vpc).await?.ok_or_else(|| RoutesError::UnknownVpc(vpc.to_owned()))
}

fn parse(routes: &[v1::Route]) -> Result<Vec<Route>, InvalidRoute> {
    routes.iter().map(TryInto::try_into).collect()
}

fn routes(table: BTreeMap<IpNetwork, Target>) -> Vec<Route> {
    table.into_iter().map(|(prefix, target)| Route { prefix, target }).collect()
}

/// Stores what becomes of a table, if it is one that the VPC can have.
async fn change(
    store: &dyn Store,
    vpc: &str,
    change: impl Fn(BTreeMap<IpNetwork, Target>) -> Result<Vec<Route>, RoutesError>,
) -> Result<(), RoutesError> {
    let definition = known(store, vpc).await?;
    let (defaults, shared_addresses) = (definition.defaults(), definition.addresses());
    let key = key(vpc);
    loop {
        let entry = store.get(&key).await?;
        let before: Vec<Route> = match &entry {
            Some(entry) => decode(&key, &entry.value)?,
            None => Vec::new(),
        };
        let table = before.iter().map(|route| (route.prefix, route.target)).collect();
        let after = change(table)?;
        Table::new(&after, &defaults, &shared_addresses)?;
        if after == before {
            return Ok(());
        }
        let precondition = Precondition::unchanged(&key, entry.as_ref());
        match store.commit(vec![precondition], vec![Write::put(&key, &after)?]).await {
            Ok(_) => return Ok(()),
            // Someone else changed it meanwhile.
            Err(StoreError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
