//! The data paths that benchmarks open: of the topology's host and proxy.

use anyhow::Result;
use warren_dataplane::datapath::{
    DEFAULT_FLOWS, FlowLogOptions, HostOptions, ProxyOptions, Timers,
};
use warren_netns::fleet::built;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{HOST, PROXY, UNDERLAY};

/// What names of interfaces begin with.
pub const PREFIX: &str = "wrn";

/// A host with so many slots.
pub fn host(run: &RunDir, slots: u32) -> Result<HostOptions> {
    Ok(HostOptions {
        bpffs: run.bpf().join("host"),
        object: std::fs::read(built("warren-ebpf.o")?)?,
        underlay_interface: UNDERLAY.to_owned(),
        underlay_address: HOST.into(),
        slots,
        interface_prefix: PREFIX.to_owned(),
        flows: DEFAULT_FLOWS,
        timers: Timers::DEFAULT,
        flow_log: FlowLogOptions::default(),
    })
}

/// A proxy.
pub fn proxy(run: &RunDir) -> Result<ProxyOptions> {
    Ok(ProxyOptions {
        bpffs: run.bpf().join("proxy"),
        object: std::fs::read(built("warren-ebpf.o")?)?,
        underlay_interface: UNDERLAY.to_owned(),
        underlay_address: PROXY.into(),
        interface_prefix: PREFIX.to_owned(),
    })
}
