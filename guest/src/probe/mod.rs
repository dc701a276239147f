//! The built-in function: `warren_abi::probe`.

mod dns;
mod http;
mod redis;
mod tcp;
mod udp;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::wire::{IpAddress, IpEndpoint, Ipv4Address};
use warren_abi::probe::{
    Endpoint, IdentityReport, Malformed, Operation, Outcome, Reply, Request, Timings, decode,
    encode,
};

use crate::machine::{Function, Machine, Timeout};

/// Serves the network probe.
#[derive(Debug, Default)]
pub struct Probe {
    remembered: Vec<u8>,
}

/// Why an operation has no outcome.
enum Failure {
    /// The request's time is over.
    Timeout,
    /// Anything else, in words.
    Other(String),
}

impl From<Timeout> for Failure {
    fn from(Timeout: Timeout) -> Self {
        Self::Timeout
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self::Other(text.into())
    }
}

impl Function for Probe {
    fn call(&mut self, machine: &mut Machine, request: &[u8]) -> Vec<u8> {
        let mut timings = Timings { start_ns: machine.now_ns(), ..Timings::default() };
        let outcome = match decode::<Request>(request) {
            Ok(Request { operation: Operation::Remember { bytes }, .. }) => {
                self.remembered = bytes;
                Ok(Outcome::Done)
            }
            Ok(Request { operation: Operation::Recall, .. }) => {
                Ok(Outcome::Recalled(self.remembered.clone()))
            }
            Ok(request) => perform(machine, &request, &mut timings),
            Err(error @ Malformed) => Err(format!("{error}")),
        };
        timings.end_ns = machine.now_ns();
        encode(&Reply { outcome, timings })
    }
}

fn perform(
    machine: &mut Machine,
    request: &Request,
    timings: &mut Timings,
) -> Result<Outcome, String> {
    let deadline = timings.start_ns + u64::from(request.timeout_ms) * 1_000_000;
    let result = match &request.operation {
        Operation::Identity => Ok(Outcome::Identity(report(machine))),
        Operation::TcpConnect { to } => tcp::connect_and_close(machine, *to, deadline, timings),
        Operation::HttpGet { to, host, path } => {
            http::get(machine, *to, host, path, deadline, timings)
        }
        Operation::Redis { to, commands } => redis::run(machine, *to, commands, deadline, timings),
        Operation::UdpEcho { to, count, length, interval_us } => {
            let plan = udp::Plan { count: *count, length: *length, interval_us: *interval_us };
            udp::echo(machine, *to, &plan, deadline, timings)
        }
        Operation::DnsQuery { to, name } => dns::query(machine, *to, name, deadline, timings),
        Operation::BulkSend { to, bytes } => {
            tcp::bulk_send(machine, *to, *bytes, deadline, timings)
        }
        Operation::BulkReceive { to, bytes } => {
            tcp::bulk_receive(machine, *to, *bytes, deadline, timings)
        }
        Operation::SendFrame { frame } => send_frame(machine, frame, deadline),
        Operation::Remember { .. } | Operation::Recall => Ok(Outcome::Done),
    };
    result.map_err(|failure| match failure {
        Failure::Timeout => format!("no answer within {} ms", request.timeout_ms),
        Failure::Other(text) => text,
    })
}

fn report(machine: &Machine) -> IdentityReport {
    IdentityReport {
        mac: machine.identity.mac,
        ipv4: machine.identity.ipv4,
        hostname: machine.hostname(),
        instance_id: machine.identity.instance_id,
        random: machine.first_random,
        wall_clock_ns: machine.clock.wall_clock_ns(),
    }
}

fn send_frame(machine: &mut Machine, frame: &[u8], deadline: u64) -> Result<Outcome, Failure> {
    if frame.is_empty() || frame.len() > 1514 {
        return Err("a frame has 1 to 1514 bytes".into());
    }
    while !machine.device.send(frame) {
        machine.wait_before(deadline)?;
    }
    // On the wire before the reply says so.
    machine.wait(0);
    Ok(Outcome::Done)
}

fn endpoint(to: Endpoint) -> Result<IpEndpoint, Failure> {
    if to.port == 0 || to.address == [0; 4] {
        return Err("the server's address or port is 0".into());
    }
    Ok(IpEndpoint::new(IpAddress::Ipv4(Ipv4Address::from(to.address)), to.port))
}
