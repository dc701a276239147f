//! `warren route`.

use std::net::IpAddr;

use warren_proto::route::Route;
use warren_proto::v1::{self, RouteKind};

use crate::args::{Output, RouteCommand, TargetArguments};
use crate::client::Client;
use crate::commands::print;
use crate::error::Error;
use crate::render::{self, RouteRow, route_rows};

/// Runs the command; what changes a table prints what it changed.
pub async fn run(mut client: Client, output: Output, command: RouteCommand) -> Result<(), Error> {
    let rows = match command {
        RouteCommand::Add { vpc, prefix, target } => {
            let route = definition(prefix, &target);
            client.add_route(vpc, route.clone()).await?;
            return print(&render::one(output, &RouteRow::of_table(route)));
        }
        RouteCommand::Delete { vpc, prefixes } => {
            client.delete_routes(vpc.clone(), prefixes).await?;
            route_rows(client.routes(vpc).await?)
        }
        RouteCommand::List { vpc } => route_rows(client.routes(vpc).await?),
        RouteCommand::Replace { vpc, file } => {
            let text = std::fs::read_to_string(&file).map_err(|error| {
                Error::Usage(format!("cannot read {}: {error}", file.display()))
            })?;
            let routes = parse(&text)
                .map_err(|problem| Error::Usage(format!("{}: {problem}", file.display())))?;
            client.replace_routes(vpc.clone(), routes).await?;
            route_rows(client.routes(vpc).await?)
        }
    };
    print(&render::list(output, &rows))
}

fn definition(prefix: String, target: &TargetArguments) -> v1::Route {
    let kind = match target {
        TargetArguments { via: Some(_), .. } => RouteKind::Via,
        TargetArguments { blackhole: true, .. } => RouteKind::Blackhole,
        _ => RouteKind::Local,
    };
    let via = target.via.as_ref().map(IpAddr::to_string).unwrap_or_default();
    v1::Route { prefix, kind: kind.into(), via }
}

/// Reads a file of routes; an error names the line.
fn parse(text: &str) -> Result<Vec<v1::Route>, String> {
    let mut routes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            let route: Route = line.parse().map_err(|error| format!("line {number}: {error}"))?;
            routes.push(route.into());
        }
    }
    Ok(routes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_routes_comments_and_empty_lines() {
        let text = "# all\n10.9.0.0/16 via 10.1.0.2 # there\n\n  fd00::/8\tlocal\n";
        let routes = parse(text).unwrap();
        let prefixes: Vec<_> = routes.iter().map(|route| &route.prefix[..]).collect();
        assert_eq!(prefixes, ["10.9.0.0/16", "fd00::/8"]);
        assert_eq!(routes[0].via, "10.1.0.2");
        let error = parse("10.9.0.0/16 local\n10.9.0.1/16 local").unwrap_err();
        assert!(error.starts_with("line 2: ") && error.contains("write 10.9.0.0/16"), "{error}");
    }
}
