//! `attach`: what connecting a slot to a VPC costs on a host with 4,000 of them, seen from inside
//! and from the proxy; what making the slots costs; and what others do for each instance instead.
//!
//! Attaching is measured both ways it happens: one slot after another, as when a host scales up, and
//! a single one out of idleness, when the kernel's side of any system call is no longer in the
//! processor's caches: a write of the same size to a map that nobody uses tells how much of it that
//! is.
//!
//! A stand-in guest sends datagrams without a pause, all along: those before the attachment are
//! dropped at its TAP, the first one after it is what the proxy's underlay interface time-stamps.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use aya::maps::{HashMap, MapData};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use etherparse::PacketBuilder;
use indicatif::ProgressIterator;
use warren_abi::maps::{self, programs};
use warren_abi::wire::GATEWAY_MAC;
use warren_bench::figures::Figures;
use warren_dataplane::datapath::{HostDatapath, HostOptions, HostVpc, PortRange, Slot};
use warren_netns::capture::{Capture, vni};
use warren_netns::guest::open_tap;
use warren_netns::rundir::RunDir;
use warren_netns::topology::{PROXY, SERVER, SHARED, Topology, UNDERLAY};

use crate::options;

const VNI: u32 = 4096;
/// Slots of the host.
const SLOTS: u32 = 4000;
/// How often all of them are made, and adopted.
const OPENS: u32 = 5;
/// Slots that are attached one after another, each round.
const BURST: usize = 32;
/// For how long nothing is done before a single one is: what is on its way arrives, and is not taken
/// for its first packet.
const IDLE: Duration = Duration::from_millis(5);

pub fn run(rounds: u32) -> Result<Figures> {
    let topology = Topology::new()?;
    let run = RunDir::new()?;
    let options = options::host(&run, SLOTS)?;
    let mut figures = Figures::new("attach");
    let measured = topology.host.run(|| {
        let datapath = opens(&options, &mut figures)?;
        attaches(&datapath, &topology, rounds, &options.object, &mut figures)
    });
    topology.host.run(|| HostDatapath::uninstall(&options))?;
    measured.map(|()| figures)
}

/// Makes all slots from nothing, and adopts them as a daemon does that starts again.
fn opens(options: &HostOptions, figures: &mut Figures) -> Result<HostDatapath> {
    let (mut made, mut adopted) = (Vec::new(), Vec::new());
    let mut datapath = None;
    for _ in (0..OPENS).progress() {
        drop(datapath.take());
        HostDatapath::uninstall(options)?;
        let clock = Instant::now();
        drop(HostDatapath::open(options)?);
        made.push(clock.elapsed().as_secs_f64());
        let clock = Instant::now();
        datapath = Some(HostDatapath::open(options)?);
        adopted.push(clock.elapsed().as_secs_f64());
    }
    figures.distribution("slots_4000_ready_s", made);
    figures.distribution("slots_4000_adopted_s", adopted);
    datapath.context("no round")
}

fn attaches(
    datapath: &HostDatapath,
    topology: &Topology,
    rounds: u32,
    object: &[u8],
    figures: &mut Figures,
) -> Result<()> {
    datapath.apply_vpc(&HostVpc {
        vni: VNI,
        shared_address: SHARED,
        shared_address_v6: None,
        ports: PortRange { base: 1024, count: 1024 },
        proxy_address: PROXY.into(),
        proxies: Vec::new(),
    })?;
    let slot = datapath.slots().first().context("no slot")?.clone();
    let tap = File::from(datapath.open_tap(slot.number)?);
    let capture = Capture::start(&topology.proxy, UNDERLAY)?;
    let mut peer = Peer::load(object)?;
    let stop = AtomicBool::new(false);
    let mut taken: [Vec<f64>; 6] = Default::default();
    let [attaches, detaches, singles, floors, first_packets, peers] = &mut taken;
    let others: Vec<u32> =
        datapath.slots().iter().skip(1).take(BURST).map(|slot| slot.number).collect();
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| send_until(&stop, &tap, &slot));
        // Whatever happens in here, the sender must end.
        let result = (0..rounds).progress().try_for_each(|_| -> Result<()> {
            for &other in &others {
                let clock = Instant::now();
                datapath.attach(other, VNI)?;
                attaches.push(micros(clock));
            }
            for &other in &others {
                let clock = Instant::now();
                datapath.detach(other)?;
                detaches.push(micros(clock));
            }
            peers.push(peer.make()?);
            std::thread::sleep(IDLE);
            floors.push(peer.write_map()?);
            std::thread::sleep(IDLE);
            capture.drain()?;
            let (wall, clock) = (SystemTime::now().duration_since(UNIX_EPOCH)?, Instant::now());
            datapath.attach(slot.number, VNI)?;
            singles.push(micros(clock));
            let arrived = first_packet(&capture)?;
            first_packets.push(arrived.saturating_sub(wall.as_nanos() as u64) as f64 / 1000.0);
            datapath.detach(slot.number)?;
            Ok(())
        });
        stop.store(true, Ordering::SeqCst);
        result
    })?;
    let names = [
        "attach_us",
        "detach_us",
        "attach_idle_us",
        "map_write_idle_us",
        "first_packet_us",
        "peer_tap_up_tcx_us",
    ];
    for (name, taken) in names.into_iter().zip(taken) {
        figures.distribution(name, taken);
    }
    Ok(())
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64 / 1000.0
}

/// What is done for each instance where there are no slots: make a TAP, take it up, attach the
/// program.
struct Peer {
    ebpf: Ebpf,
    /// A map like that of slots, which nobody reads.
    map: HashMap<MapData, u32, [u8; size_of::<maps::Slot>()]>,
}

impl Peer {
    const NAME: &str = "peer";

    fn load(object: &[u8]) -> Result<Self> {
        let mut ebpf = EbpfLoader::new().btf(None).load(object)?;
        program(&mut ebpf)?.load()?;
        Ok(Self { ebpf, map: HashMap::create(SLOTS, 0)? })
    }

    /// Microseconds that a write to its map takes.
    fn write_map(&mut self) -> Result<f64> {
        let clock = Instant::now();
        self.map.insert(0, [0; size_of::<maps::Slot>()], 0)?;
        Ok(micros(clock))
    }

    /// Microseconds that it takes; what was made is gone afterwards.
    fn make(&mut self) -> Result<f64> {
        let program = program(&mut self.ebpf)?;
        let clock = Instant::now();
        let tap = open_tap(Self::NAME, libc::IFF_VNET_HDR)?;
        set_up(Self::NAME)?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let link = program.attach_with_options(Self::NAME, TcAttachType::Ingress, options)?;
        let took = micros(clock);
        program.detach(link)?;
        drop(tap);
        Ok(took)
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut(programs::TAP).context("no program for TAPs")?.try_into()?)
}

nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);

/// Takes an interface up without IPv6 on it, by system calls alone.
fn set_up(name: &str) -> Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    // A kernel without IPv6 has no such file, and needs none.
    std::fs::write(path, "1").ok();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    // SAFETY: all of its fields are integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the descriptor is open; the request points to a whole `ifreq`.
    unsafe { set_interface_flags(std::os::fd::AsRawFd::as_raw_fd(&socket), &raw const request) }?;
    Ok(())
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
