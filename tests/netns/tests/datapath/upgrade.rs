//! Upgrades under traffic: to another layout of the maps, and upgrades that fail.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::{FdLink, LinkType, PinnedLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use nix::net::if_::{if_indextoname, if_nametoindex};
use warren_abi::maps::{names, programs};
use warren_dataplane::datapath::{Error, HostDatapath, HostOptions};
use warren_netns::netns::Namespace;
use warren_netns::servers::{bulk_source, udp, udp_echo};
use warren_netns::topology::{HOST, MTU, PROXY, SERVER, SHARED, UNDERLAY};

use crate::bed::{Bed, PORTS, SLOTS, VNI_A};
use crate::guest::{KernelGuest, PATIENCE};
use crate::lifecycle::{Restarts, download, during, stream};

const PORT: u16 = 7000;
const NEW_FLOWS: u16 = 7001;
const BULK: u16 = 7002;

/// The programs of the first release, whose maps have layout 1; without debug information.
const FIRST_RELEASE: &[u8] = include_bytes!("layout1.o");

/// Puts the data path of the first release in the place of the bed's, its first slot attached.
fn install_first_release(bed: &mut Bed) {
    let slots = bed.host().slots().to_vec();
    bed.host = None;
    let directory = bed.host_options().bpffs;
    for pins in ["links", "maps"].map(|name| directory.join(name)) {
        for pin in std::fs::read_dir(&pins).expect("there are pins").flatten() {
            std::fs::remove_file(pin.path()).expect("it can be unpinned");
        }
    }
    let ifindex = bed.topology.host.run(|| if_nametoindex(UNDERLAY)).expect("it is there");
    // The layout of that release: index, address, MTU of the underlay.
    let underlay = [ifindex, u32::from_ne_bytes(HOST.octets()), MTU];
    let entries = [
        (names::SLOTS, 4096),
        (names::HOST_VPCS, 4096),
        ("CT_OUT", 1 << 17),
        ("CT_IN", 1 << 17),
        ("DROPS", 4097),
    ];
    let mut loader = EbpfLoader::new();
    loader.btf(None).override_global("UNDERLAY", &underlay, true);
    for (name, entries) in entries {
        loader.map_max_entries(name, entries).map_pin_path(name, directory.join("maps").join(name));
    }
    let mut ebpf = loader.load(FIRST_RELEASE).expect("it loads");

    // The layouts of that release: `Slot`, then `HostVpc`.
    let mut map: HashMap<_, u32, [u8; 32]> = table(&mut ebpf, names::SLOTS);
    for slot in &slots {
        let vni = if slot.number == 1 { VNI_A } else { 0 };
        let mut entry = [0; 32];
        entry[..4].copy_from_slice(&vni.to_ne_bytes());
        entry[4..8].copy_from_slice(&1u32.to_ne_bytes());
        entry[8..12].copy_from_slice(&slot.ifindex.to_ne_bytes());
        entry[12..16].copy_from_slice(&slot.number.to_ne_bytes());
        entry[16..20].copy_from_slice(&slot.address.octets());
        entry[20..26].copy_from_slice(&slot.mac);
        map.insert(slot.ifindex, entry, 0).expect("there is room");
    }
    let mut map: HashMap<_, u32, [u8; 16]> = table(&mut ebpf, names::HOST_VPCS);
    let mut entry = [0; 16];
    entry[..4].copy_from_slice(&SHARED.octets());
    entry[4..8].copy_from_slice(&PROXY.octets());
    entry[8..12].copy_from_slice(&u32::from(PORTS.base).to_ne_bytes());
    entry[12..].copy_from_slice(&PORTS.count.to_ne_bytes());
    map.insert(VNI_A, entry, 0).expect("there is room");

    let host = bed.topology.host.clone();
    let mut attach = |name: &str, interface: &str, link: String| {
        let program: &mut SchedClassifier =
            ebpf.program_mut(name).expect("it has it").try_into().expect("it is one");
        if program.fd().is_err() {
            program.load().expect("the kernel takes it");
        }
        let attached = host.run(|| {
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            program.attach_with_options(interface, TcAttachType::Ingress, options)
        });
        let link_pin = directory.join("links").join(link);
        let attached = program.take_link(attached.expect("it is attached")).expect("it is there");
        FdLink::try_from(attached).expect("by tcx").pin(link_pin).expect("it can be pinned");
    };
    attach(programs::TUNNEL_HOST, "wrn-vxlan", "tunnel".to_owned());
    for slot in &slots {
        attach(programs::TAP, &slot.ifname, format!("tap-{}", slot.number));
    }
}

fn table<V: aya::Pod>(ebpf: &mut Ebpf, name: &str) -> HashMap<MapData, u32, V> {
    let map = ebpf.take_map(name).expect("the object has it");
    HashMap::try_from(map).expect("its layout is this")
}

/// Tells everyone by which port it speaks.
fn tell_ports(vpc: &Namespace, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let socket = udp(vpc, NEW_FLOWS).expect("the port is free");
    std::thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            if let Ok((_, from)) = socket.recv_from(&mut [0; 8]) {
                socket.send_to(&from.port().to_be_bytes(), from).ok();
            }
        }
    })
}

/// Begins flow after flow until it is stopped, or most ports are taken; each must keep its port, and
/// lose nothing.
fn begin_flows(guest: &Namespace, stop: &AtomicBool) -> u32 {
    guest.run(|| {
        let mut flows = 0;
        while !stop.load(Ordering::SeqCst) && flows < PORTS.count / 4 * 3 {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
            socket.connect((SERVER, NEW_FLOWS)).expect("there is a route");
            socket.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
            let mut ports = [0; 4].map(|_: u16| {
                socket.send(b"port?").expect("the guest can send");
                let mut port = [0; 2];
                socket.recv(&mut port).expect("nothing is lost");
                u16::from_be_bytes(port)
            });
            ports.sort_unstable();
            assert_eq!(ports[0], ports[3], "a flow got another port");
            flows += 1;
            // They are to last as long as the restarts.
            std::thread::sleep(Duration::from_millis(10));
        }
        flows
    })
}

/// What is pinned of the host, by name.
fn pins(bed: &Bed) -> Vec<String> {
    let names = bed.run.pins().into_iter().filter(|pin| pin.to_string_lossy().contains("/host/"));
    let mut names: Vec<_> =
        names.map(|pin| pin.file_name().expect("it has one").display().to_string()).collect();
    names.sort_unstable();
    names
}

/// The numbers of the programs at the host's hooks.
fn hooks(bed: &Bed) -> Vec<u32> {
    let links = bed.host_options().bpffs.join("links");
    let mut names = vec!["tunnel".to_owned()];
    names.extend((1..=SLOTS).map(|slot| format!("tap-{slot}")));
    let ids = names.iter().filter_map(|name| {
        let pin = links.join(name);
        if let Ok(filter) = std::fs::read_link(&pin) {
            return Some(program_of(&bed.topology.host, filter.to_str()?));
        }
        let link = FdLink::from(PinnedLink::from_pin(pin).ok()?);
        let info = link.info().ok()?;
        // What is in the way of one is none.
        (info.link_type().ok()? == LinkType::Tcx).then(|| info.program_id())
    });
    ids.collect()
}

/// The number of the program of a filter, which a kernel without tcx has: `clsact INTERFACE ingress
/// PRIORITY`.
fn program_of(host: &Namespace, filter: &str) -> u32 {
    let words: Vec<_> = filter.split(' ').collect();
    let ["clsact", index, hook, priority] = words[..] else { panic!("{filter}") };
    let index: u32 = index.parse().expect("it is an index");
    let output = host.run(|| {
        let interface = if_indextoname(index).expect("it is there");
        let interface = interface.to_str().expect("it is ASCII").to_owned();
        Command::new("tc").args(["filter", "show", "dev", &interface, hook]).output()
    });
    // A filter's line: ... pref PRIORITY bpf chain 0 handle 0x1 tap direct-action ... id NUMBER ...
    let text = String::from_utf8(output.expect("tc runs").stdout).expect("it is ASCII");
    let is_it = |line: &&str| line.contains(&format!(" pref {priority} ")) && line.contains(" id ");
    let line = text.lines().find(is_it).unwrap_or_else(|| panic!("{filter}: {text}"));
    let id = line.split(" id ").nth(1).and_then(|rest| rest.split(' ').next());
    id.and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

fn try_open(bed: &Bed, options: &HostOptions) -> Result<HostDatapath, Error> {
    bed.topology.host.run(|| HostDatapath::open(options))
}

#[test]
fn flows_of_the_first_release_go_on_with_no_packet_lost() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    let vpc = bed.topology.vpcs[0].clone();
    let _echo = udp_echo(&vpc, PORT).expect("the server starts");
    let bytes = 8 << 20;
    let _source = bulk_source(&vpc, BULK, bytes, 4 << 20).expect("the server starts");
    install_first_release(&mut bed);
    assert!(pins(&bed).contains(&"CT_OUT".to_owned()));

    // The server stops after the last of its clients has: a closed port answers ICMP 3/3.
    let (stop, stop_server) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
    let ports = tell_ports(&vpc, stop_server.clone());
    let namespace = guest.namespace.clone();
    let traffic = |restarts: &Restarts| {
        std::thread::scope(|scope| {
            let begun = scope.spawn(|| begin_flows(&namespace, &stop));
            let download = scope.spawn(|| download(&namespace, BULK, bytes));
            let lost = stream(&namespace, 4000, restarts);
            let download = download.join().expect("it does not panic");
            stop.store(true, Ordering::SeqCst);
            (lost, download, begun.join().expect("it does not panic"))
        })
    };
    let mut opened = 0;
    let (lost, downloaded, begun) = during(traffic, || {
        // The first release has the beginning; then comes this version, and comes again.
        std::thread::sleep(Duration::from_millis(400));
        bed.reopen_host();
        opened += 1;
    });
    stop_server.store(true, Ordering::SeqCst);
    ports.join().expect("it does not panic");
    assert_eq!(lost, 0, "datagrams");
    assert!(downloaded);
    assert!(begun > 50, "{begun} flows began");
    assert!(opened > 1);
    assert_eq!(bed.host().drops().expect("counters can be read"), []);
    let left = pins(&bed);
    assert!(!left.iter().any(|pin| pin == "CT_OUT" || pin.ends_with("-new")), "{left:?}");
}

#[test]
fn an_upgrade_of_the_layout_that_fails_half_way_leaves_the_former_programs_at_work() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    install_first_release(&mut bed);
    let obstacle = obstruct(&bed, "tap-3-new");
    let before = (hooks(&bed), pins(&bed));
    let options = bed.host_options();
    let lost = during(
        |restarts| stream(&guest.namespace, 2500, restarts),
        || {
            try_open(&bed, &options).expect_err("something is in the way");
            assert_eq!((hooks(&bed), pins(&bed)), before);
        },
    );
    assert_eq!(lost, 0);
    std::fs::remove_file(obstacle).expect("it can be unpinned");
    let lost = during(|restarts| stream(&guest.namespace, 2500, restarts), || bed.reopen_host());
    assert_eq!(lost, 0);
    assert!(hooks(&bed).iter().all(|program| !before.0.contains(program)));
}

/// Pins a map where a link belongs: neither can it be used, nor is there room for another pin.
fn obstruct(bed: &Bed, link: &str) -> PathBuf {
    let directory = bed.host_options().bpffs;
    let obstacle = directory.join("links").join(link);
    std::fs::remove_file(&obstacle).ok();
    let map = MapData::from_pin(directory.join("maps").join(names::SLOTS)).expect("it is there");
    Map::HashMap(map).pin(&obstacle).expect("it can be pinned");
    obstacle
}

#[test]
fn an_upgrade_that_fails_half_way_puts_the_former_programs_back() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let obstacle = obstruct(&bed, "tap-3");
    let before = (hooks(&bed), pins(&bed));
    assert_eq!(before.0.len(), SLOTS as usize, "all but one have a program");
    bed.host = None;
    let options = bed.host_options();
    let lost = during(
        |restarts| stream(&guest.namespace, 2500, restarts),
        || {
            try_open(&bed, &options).expect_err("something is in the way");
            assert_eq!((hooks(&bed), pins(&bed)), before);
        },
    );
    assert_eq!(lost, 0);
    std::fs::remove_file(obstacle).expect("it can be unpinned");
    bed.reopen_host();
    assert!(hooks(&bed).iter().all(|program| !before.0.contains(program)));
}

/// The object, one of its programs beginning with an instruction that there is none of.
fn broken(object: &[u8], program: &str) -> Vec<u8> {
    let elf = elf::ElfBytes::<elf::endian::LittleEndian>::minimal_parse(object).expect("it is one");
    let (symbols, strings) = elf.symbol_table().expect("it is whole").expect("it has one");
    let is_it = |name: usize| strings.get(name).is_ok_and(|name| name == program);
    let symbol = symbols.iter().find(|symbol| is_it(symbol.st_name as usize));
    let symbol = symbol.expect("the object has the program");
    let sections = elf.section_headers().expect("it has sections");
    let section = sections.get(symbol.st_shndx.into()).expect("it is in one");
    let mut bytes = object.to_vec();
    bytes[(section.sh_offset + symbol.st_value) as usize] = 0xff;
    bytes
}

#[test]
fn programs_that_the_kernel_rejects_change_nothing() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    let before = (hooks(&bed), pins(&bed));
    bed.host = None;
    for program in [programs::TAP, programs::TUNNEL_HOST, programs::SWEEP] {
        let mut options = bed.host_options();
        options.object = broken(&options.object, program);
        let lost = during(
            |restarts| stream(&guest.namespace, 2500, restarts),
            || {
                let error = try_open(&bed, &options).expect_err("the kernel rejects it");
                let named = matches!(&error, Error::Program { object, .. } if object == program);
                assert!(named, "{error}");
            },
        );
        assert_eq!(lost, 0);
        assert_eq!((hooks(&bed), pins(&bed)), before);
    }
    bed.reopen_host();
}
