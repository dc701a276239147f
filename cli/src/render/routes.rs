//! Routes.

use serde::Serialize;
use warren_proto::v1::{self, RouteKind};

use super::{Row, dash, some};

/// A route of a VPC.
#[derive(Serialize)]
pub struct RouteRow {
    prefix: String,
    kind: &'static str,
    via: Option<String>,
    /// `table`, or `vpc`: of the VPC's CIDR or gateway.
    origin: &'static str,
}

impl RouteRow {
    /// A route of a VPC's table.
    pub fn of_table(route: v1::Route) -> Self {
        Self::new(route, "table")
    }

    fn new(route: v1::Route, origin: &'static str) -> Self {
        let kind = match route.kind() {
            RouteKind::Local => "local",
            RouteKind::Via => "via",
            RouteKind::Blackhole => "blackhole",
            RouteKind::Unspecified => "unknown",
        };
        Self { prefix: route.prefix, kind, via: some(route.via), origin }
    }
}

/// The routes that are in force in a VPC.
pub fn route_rows(listed: v1::ListRoutesResponse) -> Vec<RouteRow> {
    let defaults = listed.defaults.into_iter().map(|route| RouteRow::new(route, "vpc"));
    defaults.chain(listed.routes.into_iter().map(RouteRow::of_table)).collect()
}

impl Row for RouteRow {
    const HEADER: &'static [&'static str] = &["PREFIX", "KIND", "NEXT HOP", "ORIGIN"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.prefix.clone(),
            self.kind.to_owned(),
            dash(self.via.as_deref()),
            self.origin.to_owned(),
        ]
    }
}
