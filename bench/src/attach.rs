//! `attach`: what connecting a slot to a VPC costs, seen from inside and from the proxy.
//!
//! A stand-in guest sends datagrams without a pause, all along: those before the attachment are
//! dropped at its TAP, the first one after it is what the proxy's underlay interface time-stamps.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use indicatif::ProgressIterator;
use warren_abi::wire::GATEWAY_MAC;
use warren_bench::figures::Figures;
use warren_dataplane::datapath::{
    DEFAULT_FLOWS, HostDatapath, HostOptions, HostVpc, PortRange, Slot,
};
use warren_netns::capture::{Capture, vni};
use warren_netns::fleet::built;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{HOST, PROXY, SERVER, SHARED, Topology, UNDERLAY};

const VNI: u32 = 4096;

pub fn run(rounds: u32) -> Result<Figures> {
    let topology = Topology::new()?;
    let run = RunDir::new()?;
    let options = HostOptions {
        bpffs: run.bpf().join("host"),
        object: std::fs::read(built("warren-ebpf.o")?)?,
        underlay_interface: UNDERLAY.to_owned(),
        underlay_address: HOST,
        slots: 1,
        interface_prefix: "wrn".to_owned(),
        flows: DEFAULT_FLOWS,
    };
    let figures = topology.host.run(|| measure(&options, &topology, rounds));
    topology.host.run(|| HostDatapath::uninstall(&options))?;
    figures
}

fn measure(options: &HostOptions, topology: &Topology, rounds: u32) -> Result<Figures> {
    let datapath = HostDatapath::open(options)?;
    datapath.apply_vpc(&HostVpc {
        vni: VNI,
        shared_address: SHARED,
        ports: PortRange { base: 1024, count: 1024 },
        proxy_address: PROXY,
    })?;
    let slot = datapath.slots().first().context("no slot")?.clone();
    let tap = File::from(datapath.open_tap(slot.number)?);
    let capture = Capture::start(&topology.proxy, UNDERLAY)?;
    let stop = AtomicBool::new(false);
    let (mut writes, mut first_packets) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| send_until(&stop, &tap, &slot));
        // Whatever happens in here, the sender must end.
        let result = (0..rounds).progress().try_for_each(|_| -> Result<()> {
            capture.drain()?;
            let (wall, clock) = (SystemTime::now().duration_since(UNIX_EPOCH)?, Instant::now());
            datapath.attach(slot.number, VNI)?;
            writes.push(clock.elapsed().as_nanos() as f64 / 1000.0);
            let arrived = first_packet(&capture)?;
            first_packets.push(arrived.saturating_sub(wall.as_nanos() as u64) as f64 / 1000.0);
            datapath.detach(slot.number)?;
            std::thread::sleep(Duration::from_millis(5));
            Ok(())
        });
        stop.store(true, Ordering::SeqCst);
        result
    })?;
    let mut figures = Figures::new("attach");
    figures.distribution("attach_us", writes);
    figures.distribution("attach_to_first_packet_at_proxy_us", first_packets);
    Ok(figures)
}

fn first_packet(capture: &Capture) -> Result<u64> {
    loop {
        let frame = capture.next(Duration::from_secs(1))?.context("no packet at the proxy")?;
        if vni(&frame.bytes).is_some() {
            return Ok(frame.unix_ns);
        }
    }
}

fn send_until(stop: &AtomicBool, tap: &File, slot: &Slot) {
    // A virtio-net header of zeroes, then a datagram.
    let mut frame = vec![0; 12];
    PacketBuilder::ethernet2(slot.mac, GATEWAY_MAC.octets())
        .ipv4(slot.address.octets(), SERVER.octets(), 64)
        .udp(4000, 9)
        .write(&mut frame, &[0; 64])
        .expect("a Vec takes any frame");
    while !stop.load(Ordering::SeqCst) {
        // A full queue is no matter: the next one follows at once.
        let _ = (&mut &*tap).write(&frame);
    }
}
