//! The command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use warren_proto::endpoint::Endpoint;
use warren_proto::limits::Limits;

use crate::error::EXIT_CODES;
use crate::flows::Moment;
use crate::function::FunctionCommand;
use crate::probe::Operation;
use crate::security::{GuardArguments, SecurityGroupCommand};
use crate::trigger::TriggerCommand;

/// Runs microVMs that stand in your VPCs.
#[derive(Debug, Parser)]
#[command(name = "warren", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// Where the control plane listens: unix:PATH or an http URL with a numeric address.
    #[arg(
        long,
        global = true,
        env = "WARREN_ENDPOINT",
        default_value = "unix:/run/warren/control.sock"
    )]
    pub endpoint: Endpoint,
    /// How to print results.
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(subcommand)]
    pub command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Virtual private clouds: the networks that microVMs stand in.
    #[command(subcommand)]
    Vpc(VpcCommand),
    /// MicroVMs.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Hosts and proxy nodes.
    #[command(subcommand)]
    Host(HostCommand),
    /// What microVMs are cloned from.
    #[command(subcommand)]
    Template(TemplateCommand),
    /// What was dropped, where and why.
    Drops(DropsArguments),
    /// The flows of microVMs: who talks to whom, as whom.
    Flows(FlowsArguments),
    /// Who had a port of a VPC's shared address at some time.
    NatLog(NatLogArguments),
    /// Packets of a microVM, on both sides of the NAT, as pcapng.
    Capture(CaptureArguments),
    /// Where packets go in a VPC.
    #[command(subcommand)]
    Route(RouteCommand),
    /// Which flows microVMs may have.
    #[command(subcommand)]
    SecurityGroup(SecurityGroupCommand),
    /// WebAssembly components that answer calls, each instance a microVM.
    #[command(subcommand)]
    Function(FunctionCommand),
    /// Which calls functions answer.
    #[command(subcommand)]
    Trigger(TriggerCommand),
}

#[derive(Debug, Subcommand)]
pub enum VpcCommand {
    /// Make a VPC known.
    Create(VpcCreate),
    /// List the VPCs.
    Ls,
    /// Give a VPC one more shared address: microVMs that start from now on are spread over all of
    /// them, and proxies share them out.
    AddAddress(AddAddress),
    /// Show or change what holds for a VPC's microVMs that have no security groups or limits of
    /// their own. Without a flag it shows it; what no flag names stays.
    Guard(GuardArguments),
}

#[derive(Debug, Args)]
pub struct VpcCreate {
    /// Name: lower-case letters, digits and inner hyphens.
    pub name: String,
    /// The VPC's addresses, such as 10.1.0.0/16.
    #[arg(long)]
    pub cidr: String,
    /// Address in the VPC that its microVMs are seen as. It must be free. Several, each with this flag,
    /// are shared out among the proxies.
    #[arg(long, value_name = "ADDRESS", required = true)]
    pub shared_address: Vec<Ipv4Addr>,
    /// Interface of the proxy nodes that stands in the VPC.
    #[arg(long)]
    pub interface: String,
    /// Next hop in the VPC for addresses outside the CIDR.
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Option<Ipv4Addr>,
    /// The VPC's IPv6 addresses, such as `2001:db8:1::/64`. Without them, microVMs have no IPv6.
    #[arg(long, value_name = "CIDR", requires = "shared_address_v6")]
    pub cidr_v6: Option<String>,
    /// IPv6 address in the VPC that its microVMs are seen as, one for each --shared-address. It must
    /// be free.
    #[arg(long, value_name = "ADDRESS", requires = "cidr_v6")]
    pub shared_address_v6: Vec<Ipv6Addr>,
    /// IPv6 next hop in the VPC for addresses outside the IPv6 CIDR. It may be link-local.
    #[arg(long, value_name = "ADDRESS", requires = "cidr_v6")]
    pub gateway_v6: Option<Ipv6Addr>,
    /// VPC by whose addresses leaves what has no route in this one, with the same ports: one of its own in
    /// a public network, with as many shared addresses, and without microVMs.
    #[arg(long, value_name = "VPC", default_value = "", hide_default_value = true)]
    pub public: String,
    /// Ports of the shared address that each host begins with and keeps at least: a power of two, 64
    /// to 32768. It gets more ahead of need.
    #[arg(long, value_name = "PORTS", default_value_t = 64)]
    pub ports_per_host: u32,
    /// The VPC's resolver, which answers microVMs' DNS queries to 169.254.169.253.
    #[arg(long, value_name = "ADDRESS")]
    pub resolver: Option<Ipv4Addr>,
    /// Domain in which names of one label are looked for first, such as corp.internal.
    #[arg(long, value_name = "DOMAIN", default_value = "", hide_default_value = true)]
    pub search_domain: String,
}

#[derive(Debug, Args)]
pub struct AddAddress {
    /// Name of the VPC.
    pub vpc: String,
    /// A free address of the VPC.
    pub address: Ipv4Addr,
    /// A free IPv6 address of the VPC, if it has IPv6.
    #[arg(long, value_name = "ADDRESS")]
    pub v6: Option<Ipv6Addr>,
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List the hosts and proxies.
    Ls,
    /// Have proxies own no shared addresses any more: their traffic goes over to others without loss,
    /// and then they may be stopped. Waits until that is so.
    Drain {
        /// Names.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Undo `drain`.
    Undrain {
        /// Names.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Forget hosts and proxies that are gone for good: a host's ports become others' two minutes
    /// after each proxy has dropped it as their holder.
    Forget {
        /// Names.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// List the templates of each host, and how many microVMs wait there: the first is what microVMs
    /// are of that name none.
    Ls,
}

#[derive(Debug, Args)]
pub struct DropsArguments {
    /// Only of this host or proxy.
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// Print what is dropped from now on, once a second, until Ctrl-C; with --output json a line
    /// each.
    #[arg(long, short)]
    pub follow: bool,
}

#[derive(Debug, Args)]
pub struct FlowsArguments {
    /// Only of this host.
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// Only of this VPC.
    #[arg(long, value_name = "NAME")]
    pub vpc: Option<String>,
    /// Only of this microVM: its id, or the beginning.
    #[arg(long, value_name = "ID")]
    pub instance: Option<String>,
    /// At most so many of each host, the least idle ones.
    #[arg(long, value_name = "NUMBER", default_value_t = 1000,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
}

#[derive(Debug, Args)]
pub struct NatLogArguments {
    /// VPC.
    #[arg(long, value_name = "NAME")]
    pub vpc: String,
    /// Port of its shared address, or ICMP echo identifier.
    #[arg(long)]
    pub port: u16,
    /// Only of this protocol.
    #[arg(long, value_enum)]
    pub protocol: Option<Protocol>,
    /// In this second: a time such as 2026-11-25T08:00:00Z, or how long ago, such as 5m. Now, if no
    /// time is given.
    #[arg(long, value_name = "TIME", conflicts_with_all = ["since", "until"])]
    pub at: Option<Moment>,
    /// From this time on.
    #[arg(long, value_name = "TIME")]
    pub since: Option<Moment>,
    /// Up to this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<Moment>,
    /// Only of this host.
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// At most so many of each host, the latest ones.
    #[arg(long, value_name = "NUMBER", default_value_t = 1000,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
}

#[derive(Debug, Args)]
pub struct CaptureArguments {
    /// Id of the microVM, or its beginning.
    pub instance: String,
    /// As of tcpdump, such as 'tcp port 80'; applied on both sides, inside the tunnel.
    #[arg(long, value_name = "EXPRESSION")]
    pub filter: Option<String>,
    /// End it after so many packets, of both sides together.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// End it after so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: Option<u32>,
    /// File to write, or - for standard output.
    #[arg(long, short, value_name = "FILE")]
    pub write: PathBuf,
}

/// A protocol that has ports, or something like them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo.
    Icmp,
}

impl Protocol {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum RouteCommand {
    /// Add a route to a VPC's table. The longest prefix wins.
    Add {
        /// VPC.
        vpc: String,
        /// Such as 10.9.0.0/16; 0.0.0.0/0 is the default route.
        prefix: String,
        #[command(flatten)]
        target: TargetArguments,
    },
    /// Delete routes from a VPC's table.
    Delete {
        /// VPC.
        vpc: String,
        /// Prefixes of the routes.
        #[arg(required = true, value_name = "PREFIX")]
        prefixes: Vec<String>,
    },
    /// List the routes of a VPC: its table, and those of its CIDR and gateway.
    List {
        /// VPC.
        vpc: String,
    },
    /// Make the routes in a file the VPC's whole table.
    Replace {
        /// VPC.
        vpc: String,
        /// A route each line: PREFIX via ADDRESS, PREFIX local or PREFIX blackhole; # begins a
        /// comment.
        #[arg(long)]
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct TargetArguments {
    /// To this next hop, which must be on-link.
    #[arg(long, value_name = "ADDRESS")]
    pub via: Option<IpAddr>,
    /// Drop it.
    #[arg(long)]
    pub blackhole: bool,
    /// The addresses are on-link: on the VPC's interface.
    #[arg(long)]
    pub local: bool,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start microVMs.
    Run(VmRun),
    /// List the microVMs.
    Ls,
    /// Stop microVMs.
    Stop {
        /// Ids, or their beginnings.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Keep a microVM as it is, memory and all, on its host. It runs on.
    Snapshot {
        /// Id, or its beginning.
        id: String,
        /// Name of the snapshot: letters, digits and inner hyphens.
        name: String,
    },
    /// List the snapshots.
    Snapshots {
        /// Only of this host.
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
    },
    /// Forget snapshots. Their clones run on.
    SnapshotRm {
        /// Names.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Start clones of a snapshot: what the microVM was that it was taken of, with identities of
    /// their own, in the same VPC and on the same host.
    Clone(VmClone),
    /// Let a microVM try its network.
    Probe {
        /// Id, or its beginning.
        id: String,
        /// The microVM gives up after so many milliseconds.
        #[arg(long, value_name = "MILLISECONDS", default_value_t = 5000, global = true)]
        timeout_ms: u32,
        #[command(subcommand)]
        operation: Operation,
    },
}

#[derive(Debug, Args)]
pub struct VmRun {
    /// VPC that they stand in.
    #[arg(long)]
    pub vpc: String,
    /// Host name that the microVM sees; made of its id otherwise.
    #[arg(long, visible_alias = "name")]
    pub hostname: Option<String>,
    /// Host to start on; the one with the most free slots otherwise.
    #[arg(long)]
    pub host: Option<String>,
    /// Template that they are clones of; the first of their host otherwise.
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,
    /// Security group of the VPC, instead of its default ones. May be repeated.
    #[arg(long = "security-group", value_name = "NAME")]
    pub security_groups: Vec<String>,
    /// Limits instead of the VPC's, such as packets=20k,bits=1G,new-flows=100,flows=2000,ports=500;
    /// none: no limits.
    #[arg(long = "limit", value_name = "LIMITS")]
    pub limits: Option<Limits>,
    /// How many to start, at the same time.
    #[arg(long, value_name = "NUMBER", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
}

#[derive(Debug, Args)]
pub struct VmClone {
    /// Name of the snapshot.
    #[arg(long, value_name = "NAME")]
    pub from: String,
    /// Host name that the microVM sees; made of its id otherwise.
    #[arg(long, visible_alias = "name")]
    pub hostname: Option<String>,
    /// How many to start, at the same time.
    #[arg(long, value_name = "NUMBER", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn global_flags_may_stand_anywhere() {
        for line in [
            "warren --endpoint http://192.0.2.1:7 --output json vm ls",
            "warren vm ls -o json --endpoint http://192.0.2.1:7",
        ] {
            let arguments = parse(line).unwrap();
            assert_eq!(arguments.endpoint.to_string(), "http://192.0.2.1:7");
            assert_eq!(arguments.output, Output::Json);
        }
        let error = parse("warren --endpoint localhost vm ls").unwrap_err().to_string();
        assert!(error.contains("write unix:/PATH or http://ADDRESS:PORT"), "{error}");
    }

    #[test]
    fn vpc_create() {
        let line = "warren vpc create blue --cidr 10.1.0.0/16 --shared-address 10.1.0.9 \
                    --interface eth1 --gateway 10.1.0.1 --ports-per-host 64";
        let Command::Vpc(VpcCommand::Create(vpc)) = parse(line).unwrap().command else { panic!() };
        assert_eq!(vpc.name, "blue");
        assert_eq!(vpc.shared_address, [Ipv4Addr::new(10, 1, 0, 9)]);
        assert_eq!(vpc.gateway, Some(Ipv4Addr::new(10, 1, 0, 1)));
        assert_eq!(vpc.ports_per_host, 64);
        assert_eq!((vpc.cidr_v6, vpc.gateway_v6), (None, None));
        assert!(vpc.shared_address_v6.is_empty());
        let v6 = |flags: &str| parse(&format!("{line} {flags}"));
        let all = "--cidr-v6 fd00:1::/64 --shared-address-v6 fd00:1::9 --gateway-v6 fe80::1";
        let Command::Vpc(VpcCommand::Create(vpc)) = v6(all).unwrap().command else { panic!() };
        assert_eq!(vpc.cidr_v6.as_deref(), Some("fd00:1::/64"));
        assert_eq!(vpc.gateway_v6, Some("fe80::1".parse().unwrap()));
        for part in ["--cidr-v6 fd00:1::/64", "--shared-address-v6 fd00::9", "--gateway-v6 fe80::1"]
        {
            assert_eq!(v6(part).unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
        }
        let error = parse("warren vpc create blue --cidr 10.1.0.0/16").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
    }

    #[test]
    fn a_route_has_one_target() {
        let line = "warren route add blue 10.9.0.0/16";
        let with = |flags: &str| parse(&format!("{line} {flags}"));
        assert!(with("--via 10.1.0.2").is_ok() && with("--blackhole").is_ok());
        assert_eq!(with("").unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
        let error = with("--local --blackhole").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ArgumentConflict);
    }

    #[test]
    fn vm_run() {
        let Command::Vm(VmCommand::Run(run)) =
            parse("warren vm run --vpc blue --name web --host h1 --count 3").unwrap().command
        else {
            panic!()
        };
        assert_eq!((run.hostname.as_deref(), run.host.as_deref()), (Some("web"), Some("h1")));
        assert_eq!(run.count, 3);
        assert!(parse("warren vm run --vpc blue --count 0").is_err());
        assert!(parse("warren vm stop").is_err(), "without an id");
    }
}
