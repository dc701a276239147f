//! `warren flows` and `warren nat-log`: who talks to whom, and who had a port.

use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use warren_proto::v1::{
    FindFleetMappingsRequest, FindMappingsRequest, HostFlows, HostMappings, ListFleetFlowsRequest,
};

use crate::args::{FlowsArguments, NatLogArguments, Output};
use crate::client::Client;
use crate::commands::{all_done, print, resolve};
use crate::error::Error;
use crate::render::{self, FlowRow, MappingRow};

/// Prints the flows in hosts' tables. Hosts that do not answer are an error after the others are
/// printed.
pub async fn show(
    mut client: Client,
    output: Output,
    arguments: FlowsArguments,
) -> Result<(), Error> {
    let FlowsArguments { host, vpc, instance, limit } = arguments;
    let instance = match instance {
        Some(id) => resolve(&client.instances().await?, &id)?,
        None => String::new(),
    };
    let (host, vpc) = (host.unwrap_or_default(), vpc.unwrap_or_default());
    let request = ListFleetFlowsRequest { host, vpc, instance, limit };
    let hosts = client.flows(request).await?;
    let (all, mut rows, mut errors) = (hosts.len(), vec![], vec![]);
    for HostFlows { host, flows, total, problem } in hosts {
        if !problem.is_empty() {
            errors.push(Error::FlowsUnknown { host, problem });
            continue;
        }
        if total > flows.len() as u64 {
            eprintln!("{host} has {total} flows, the {} least idle are shown", flows.len());
        }
        rows.extend(flows.into_iter().map(|flow| FlowRow::new(host.clone(), flow)));
    }
    if errors.len() < all || all == 0 {
        print(&render::list(output, &rows))?;
    }
    all_done(errors, all)
}

/// Prints who had a port.
pub async fn nat_log(
    mut client: Client,
    output: Output,
    arguments: NatLogArguments,
) -> Result<(), Error> {
    let (since, until) = arguments.times(Timestamp::now());
    if since > until {
        return Err(Error::Usage("--since is later than --until".into()));
    }
    let NatLogArguments { vpc, port, protocol, host, limit, .. } = arguments;
    let query = FindMappingsRequest {
        vpc,
        port: u32::from(port),
        protocol: protocol.map(|protocol| protocol.name().to_owned()).unwrap_or_default(),
        since_unix_ms: since.as_millisecond(),
        until_unix_ms: until.as_millisecond(),
        limit,
    };
    let host = host.unwrap_or_default();
    let hosts = client.mappings(FindFleetMappingsRequest { host, query: Some(query) }).await?;
    let (all, mut rows, mut errors) = (hosts.len(), vec![], vec![]);
    for HostMappings { host, found, problem } in hosts {
        if !problem.is_empty() {
            errors.push(Error::FlowsUnknown { host, problem });
            continue;
        }
        let found = found.ok_or(Error::Incomplete("what was found"))?;
        // What the answer may lack is told beside it.
        match found.log_since_unix_ms.map(Timestamp::from_millisecond) {
            None => eprintln!("{host} keeps no log: what ended there is not known"),
            Some(Ok(start)) if start > since => {
                eprintln!("the log of {host} begins {start:.0}: what ended before is not known");
            }
            Some(_) => {}
        }
        if found.lost > 0 {
            eprintln!("the log of {host} lacks {} events of this time", found.lost);
        }
        if found.total > found.mappings.len() as u64 {
            let shown = found.mappings.len();
            eprintln!("{host} has {} mappings, the latest {shown} are shown", found.total);
        }
        rows.extend(found.mappings.into_iter().map(|one| MappingRow::new(host.clone(), one)));
    }
    if errors.len() < all || all == 0 {
        print(&render::list(output, &rows))?;
    }
    all_done(errors, all)
}

impl NatLogArguments {
    /// The first and the last moment that are meant.
    fn times(&self, now: Timestamp) -> (Timestamp, Timestamp) {
        // Logs elsewhere have whole seconds: any part of that second.
        let second = SignedDuration::from_millis(999);
        match (self.at, self.since, self.until) {
            (Some(at), ..) => {
                let at = at.before(now);
                (at, at.saturating_add(second).unwrap_or(at))
            }
            (None, None, None) => (now, now),
            (None, since, until) => (
                since.map_or(Timestamp::UNIX_EPOCH, |since| since.before(now)),
                until.map_or(now, |until| until.before(now)),
            ),
        }
    }
}

/// A moment, or how long ago it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// This one.
    At(Timestamp),
    /// So long ago.
    Ago(SignedDuration),
}

impl Moment {
    fn before(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(moment) => moment,
            Self::Ago(age) => now.saturating_sub(age).unwrap_or(Timestamp::UNIX_EPOCH),
        }
    }
}

impl std::str::FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(moment) = text.parse() {
            return Ok(Self::At(moment));
        }
        let age = text.parse::<Span>().and_then(|span| {
            // Not those of a calendar, which depend on where one is.
            span.abs().to_duration(SpanRelativeTo::days_are_24_hours())
        });
        age.map(Self::Ago).map_err(|_| {
            "write a time such as 2026-11-25T08:00:00Z, or how long ago it was, such as 5m".into()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(at: Option<&str>, since: Option<&str>, until: Option<&str>) -> (String, String) {
        let moment = |text: &str| text.parse().unwrap();
        let arguments = NatLogArguments {
            vpc: "blue".into(),
            port: 1,
            protocol: None,
            at: at.map(moment),
            since: since.map(moment),
            until: until.map(moment),
            host: None,
            limit: 0,
        };
        let (since, until) = arguments.times("2026-11-25T08:00:00Z".parse().unwrap());
        (since.to_string(), until.to_string())
    }

    #[test]
    fn times_are_moments_or_ages() {
        let second = ("2026-11-25T07:00:00Z".into(), "2026-11-25T07:00:00.999Z".into());
        assert_eq!(times(Some("2026-11-25T08:00:00+01:00"), None, None), second);
        assert_eq!(times(Some("1h"), None, None), second);
        let now = "2026-11-25T08:00:00Z".to_owned();
        assert_eq!(times(None, None, None), (now.clone(), now.clone()));
        assert_eq!(times(None, Some("90s"), None), ("2026-11-25T07:58:30Z".into(), now.clone()));
        let (since, until) = times(None, None, Some("1d"));
        assert_eq!(
            (since.as_str(), until.as_str()),
            ("1970-01-01T00:00:00Z", "2026-11-24T08:00:00Z")
        );
        assert!("yesterday".parse::<Moment>().unwrap_err().contains("5m"));
    }
}
