//! What each command does: call, then print.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use tokio::task::JoinSet;
use warren_abi::probe::{Reply, decode, encode};
use warren_proto::v1::{Instance, RunInstanceRequest, SharedAddress, Vpc};

use crate::args::{
    AddAddress, Arguments, Command, DropsArguments, HostCommand, Output, TemplateCommand, VmClone,
    VmCommand, VmRun, VpcCommand, VpcCreate,
};
use crate::capture;
use crate::client::Client;
use crate::drain;
use crate::drops;
use crate::error::Error;
use crate::flows;
use crate::function::{self, FunctionCommand};
use crate::probe::Operation;
use crate::render::{
    self, ForgottenRow, HostRow, StoppedRow, VpcRow, instance_rows, started_rows, template_rows,
};
use crate::route;
use crate::security;
use crate::snapshots;
use crate::trigger;

/// Runs the command and prints its result on standard output.
pub async fn run(arguments: Arguments) -> Result<(), Error> {
    let Arguments { endpoint, output, command } = arguments;
    // Before connecting: what is wrong with the arguments can be told without a control plane.
    if let Command::Vm(
        VmCommand::Run(VmRun { hostname: Some(_), count: 2.., .. })
        | VmCommand::Clone(VmClone { hostname: Some(_), count: 2.., .. }),
    ) = &command
    {
        return Err(Error::Usage("--hostname names one microVM: leave it out with --count".into()));
    }
    if let Command::Function(FunctionCommand::New(arguments)) = command {
        return function::new(output, arguments);
    }
    let mut client = Client::connect(endpoint).await?;
    match command {
        Command::Vpc(VpcCommand::Create(vpc)) => {
            let vpc = client.create_vpc(definition(vpc)?).await?;
            print(&render::one(output, &VpcRow::from(vpc)))
        }
        Command::Vpc(VpcCommand::Ls) => {
            let rows: Vec<_> = client.vpcs().await?.into_iter().map(VpcRow::from).collect();
            print(&render::list(output, &rows))
        }
        Command::Vpc(VpcCommand::AddAddress(AddAddress { vpc, address, v6 })) => {
            let vpc = client.add_shared_address(vpc, shared(address, v6)).await?;
            print(&render::one(output, &VpcRow::from(vpc)))
        }
        Command::Vpc(VpcCommand::Guard(arguments)) => {
            security::guard(client, output, arguments).await
        }
        Command::Host(HostCommand::Ls) => {
            let rows: Vec<_> = client.hosts().await?.into_iter().map(HostRow::from).collect();
            print(&render::list(output, &rows))
        }
        Command::Host(HostCommand::Drain { names }) => drain::run(client, output, names).await,
        Command::Host(HostCommand::Undrain { names }) => {
            for name in &names {
                client.drain_proxy(name.clone(), false).await?;
            }
            drain::show(client, output, &names).await
        }
        Command::Host(HostCommand::Forget { names }) => {
            let mut rows = Vec::new();
            for name in names {
                client.forget_host(name.clone()).await?;
                rows.push(ForgottenRow { name });
            }
            print(&render::list(output, &rows))
        }
        Command::Template(TemplateCommand::Ls) => {
            print(&render::list(output, &template_rows(client.hosts().await?)))
        }
        Command::Drops(DropsArguments { host, follow: false }) => {
            drops::show(client, output, host.as_deref()).await
        }
        Command::Drops(DropsArguments { host, follow: true }) => {
            drops::follow(client, output, host.as_deref()).await
        }
        Command::Flows(arguments) => flows::show(client, output, arguments).await,
        Command::NatLog(arguments) => flows::nat_log(client, output, arguments).await,
        Command::Capture(arguments) => capture::run(client, output, arguments).await,
        Command::Route(command) => route::run(client, output, command).await,
        Command::SecurityGroup(command) => security::run(client, output, command).await,
        Command::Function(command) => function::run(client, output, command).await,
        Command::Trigger(command) => trigger::run(client, output, command).await,
        Command::Vm(VmCommand::Ls) => {
            let rows = instance_rows(client.instances().await?);
            print(&render::list(output, &rows))
        }
        Command::Vm(VmCommand::Run(run)) => {
            let count = run.count;
            start(client, output, run.into(), count).await
        }
        Command::Vm(VmCommand::Clone(VmClone { from, hostname, count })) => {
            let hostname = hostname.unwrap_or_default();
            let request = RunInstanceRequest { hostname, snapshot: from, ..Default::default() };
            start(client, output, request, count).await
        }
        Command::Vm(VmCommand::Snapshot { id, name }) => {
            snapshots::take(client, output, &id, name).await
        }
        Command::Vm(VmCommand::Snapshots { host }) => snapshots::list(client, output, host).await,
        Command::Vm(VmCommand::SnapshotRm { names }) => {
            snapshots::remove(client, output, names).await
        }
        Command::Vm(VmCommand::Stop { ids }) => stop(client, output, &ids).await,
        Command::Vm(VmCommand::Probe { id, timeout_ms, operation }) => {
            probe(client, output, &id, timeout_ms, operation).await
        }
    }
}

fn definition(vpc: VpcCreate) -> Result<Vpc, Error> {
    let text = |address: Option<Ipv6Addr>| address.map(|it| it.to_string()).unwrap_or_default();
    let (v4, v6) = (vpc.shared_address, vpc.shared_address_v6);
    if !v6.is_empty() && v6.len() != v4.len() {
        let problem = "give one --shared-address-v6 for each --shared-address";
        return Err(Error::Usage(problem.into()));
    }
    let v6 = v6.into_iter().map(Some).chain(std::iter::repeat(None));
    let mut addresses = v4.into_iter().zip(v6).map(|(address, v6)| shared(address, v6));
    let first = addresses.next().unwrap_or_default();
    Ok(Vpc {
        name: vpc.name,
        vni: 0,
        cidr: vpc.cidr,
        shared_address: first.address,
        interface: vpc.interface,
        gateway: vpc.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        ports_per_host: vpc.ports_per_host,
        resolver: vpc.resolver.map(|resolver| resolver.to_string()).unwrap_or_default(),
        search_domain: vpc.search_domain,
        cidr_v6: vpc.cidr_v6.unwrap_or_default(),
        shared_address_v6: first.address_v6,
        gateway_v6: text(vpc.gateway_v6),
        more_addresses: addresses.collect(),
        public: vpc.public,
        public_of: String::new(),
    })
}

fn shared(address: Ipv4Addr, v6: Option<Ipv6Addr>) -> SharedAddress {
    let address_v6 = v6.map(|address| address.to_string()).unwrap_or_default();
    SharedAddress { address: address.to_string(), address_v6, vni: 0 }
}

impl From<VmRun> for RunInstanceRequest {
    fn from(run: VmRun) -> Self {
        Self {
            vpc: run.vpc,
            hostname: run.hostname.unwrap_or_default(),
            host: run.host.unwrap_or_default(),
            invocation: None,
            security_groups: run.security_groups,
            limits: run.limits.map(Into::into),
            snapshot: String::new(),
            template: run.template.unwrap_or_default(),
        }
    }
}

/// Starts so many, at the same time.
async fn start(
    client: Client,
    output: Output,
    request: RunInstanceRequest,
    count: u32,
) -> Result<(), Error> {
    let mut starts = JoinSet::new();
    for _ in 0..count {
        let (mut client, request) = (client.clone(), request.clone());
        starts.spawn(async move { client.run(request).await });
    }
    let (started, errors) = split(starts.join_all().await);
    if !started.is_empty() {
        print(&render::list(output, &started_rows(started)?))?;
    }
    all_done(errors, count as usize)
}

async fn stop(mut client: Client, output: Output, ids: &[String]) -> Result<(), Error> {
    let instances = client.instances().await?;
    // All are resolved before the first is stopped: a typing error stops none.
    let mut found: Vec<String> =
        ids.iter().map(|id| resolve(&instances, id)).collect::<Result<_, _>>()?;
    found.sort();
    found.dedup();
    let all = found.len();
    let mut stops = JoinSet::new();
    for id in found {
        let mut client = client.clone();
        stops.spawn(async move { client.stop(id.clone()).await.map(|()| StoppedRow { id }) });
    }
    let (mut stopped, errors) = split(stops.join_all().await);
    stopped.sort_by(|a, b| a.id.cmp(&b.id));
    if !stopped.is_empty() {
        print(&render::list(output, &stopped))?;
    }
    all_done(errors, all)
}

async fn probe(
    mut client: Client,
    output: Output,
    id: &str,
    timeout_ms: u32,
    operation: Operation,
) -> Result<(), Error> {
    let request = operation.into_request(timeout_ms)?;
    let id = resolve(&client.instances().await?, id)?;
    let reply = client.call(id, encode(&request)).await?;
    let reply: Reply = decode(&reply).map_err(|_| Error::NotAProbe)?;
    print(&render::probe(output, &reply))?;
    reply.outcome.map(drop).map_err(Error::Probe)
}

/// The whole id of the one instance whose id begins with `prefix`.
pub fn resolve(instances: &[Instance], prefix: &str) -> Result<String, Error> {
    let mut ids: Vec<_> = instances
        .iter()
        .map(|instance| &instance.id)
        .filter(|id| !prefix.is_empty() && id.starts_with(prefix))
        .cloned()
        .collect();
    match (ids.pop(), ids.is_empty()) {
        (None, _) => Err(Error::NoInstance(prefix.into())),
        (Some(id), true) => Ok(id),
        (Some(last), false) => {
            ids.push(last);
            Err(Error::Ambiguous { prefix: prefix.into(), ids })
        }
    }
}

fn split<T>(results: Vec<Result<T, Error>>) -> (Vec<T>, Vec<Error>) {
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => done.push(value),
            Err(error) => errors.push(error),
        }
    }
    (done, errors)
}

/// The first error is told with how many there are.
pub fn all_done(errors: Vec<Error>, all: usize) -> Result<(), Error> {
    let failed = errors.len();
    match errors.into_iter().next() {
        None => Ok(()),
        Some(error) if all == 1 => Err(error),
        Some(first) => Err(Error::Some { failed, all, first: Box::new(first) }),
    }
}

/// Prints a result on standard output.
pub fn print(text: &str) -> Result<(), Error> {
    unless_closed(writeln!(std::io::stdout().lock(), "{text}"))
}

/// `warren vm ls | head` is no failure.
pub fn unless_closed(written: std::io::Result<()>) -> Result<(), Error> {
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_resolved_when_unambiguous() {
        let instances: Vec<_> = ["3a10", "3a20", "77"]
            .map(|id| Instance { id: id.into(), ..Instance::default() })
            .to_vec();
        assert_eq!(resolve(&instances, "3a1").unwrap(), "3a10");
        assert_eq!(resolve(&instances, "7").unwrap(), "77");
        assert!(
            matches!(resolve(&instances, "3a"), Err(Error::Ambiguous { ids, .. }) if ids.len() == 2)
        );
        assert!(matches!(resolve(&instances, "9"), Err(Error::NoInstance(id)) if id == "9"));
        assert!(matches!(resolve(&instances, ""), Err(Error::NoInstance(_))));
    }
}
