//! Restarts under traffic, and what is left behind.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use warren_dataplane::datapath::{
    Attachment, Error, HostDatapath, HostOptions, HostVpc, PortRange, ProxyDatapath,
};
use warren_netns::netns::Namespace;
use warren_netns::servers::{bulk_sink, bulk_source, udp_echo};
use warren_netns::topology::{HOST, PROXY, ROGUE, SERVER, SHARED};

use crate::bed::{Bed, PORTS, VNI_A, VNI_B, proxy_vpc};
use crate::guest::{KernelGuest, PATIENCE, open_slot};
use crate::traffic::udp_round_trip;

const PORT: u16 = 7000;

/// How often something was restarted while traffic flows.
#[derive(Default)]
pub struct Restarts(AtomicU32);

impl Restarts {
    /// Traffic began before one of them, and lasted longer than it.
    pub fn are_enough(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 1
    }
}

/// Sends at least so many numbered datagrams, a millisecond apart, to a server that echoes them, and
/// goes on until there are restarts enough. Returns how many did not come back.
pub fn stream(guest: &Namespace, least: u64, restarts: &Restarts) -> u64 {
    guest.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
        socket.connect((SERVER, PORT)).expect("there is a route");
        let all = AtomicU64::new(u64::MAX);
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                socket.set_read_timeout(Some(Duration::from_secs(2))).expect("it is not zero");
                let mut seen = BTreeSet::new();
                let mut buffer = [0; 8];
                while (seen.len() as u64) < all.load(Ordering::SeqCst)
                    && socket.recv(&mut buffer).is_ok()
                {
                    seen.insert(u64::from_be_bytes(buffer));
                }
                seen.len() as u64
            });
            let start = Instant::now();
            let mut sent = 0;
            while sent < least || !restarts.are_enough() {
                socket.send(&sent.to_be_bytes()).expect("the guest can send");
                sent += 1;
                std::thread::sleep(Duration::from_millis(sent).saturating_sub(start.elapsed()));
            }
            all.store(sent, Ordering::SeqCst);
            sent - receiver.join().expect("it does not panic")
        })
    })
}

/// Downloads `bytes`. Returns whether all bytes were right.
pub fn download(guest: &Namespace, port: u16, bytes: u64) -> bool {
    guest.run(|| {
        let mut stream = TcpStream::connect((SERVER, port)).expect("the server answers");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("the stream is whole");
        received.len() as u64 == bytes
            && received.iter().zip(0u64..).all(|(&byte, n)| u64::from(byte) == n % 251)
    })
}

/// Runs `restart` over and over while `traffic` flows, which goes on until there were enough.
pub fn during<T: Send>(
    traffic: impl FnOnce(&Restarts) -> T + Send,
    mut restart: impl FnMut(),
) -> T {
    let restarts = Restarts::default();
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(&restarts));
        while !traffic.is_finished() {
            restart();
            restarts.0.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(100));
        }
        let traffic = traffic.join().expect("it does not panic");
        assert!(restarts.are_enough(), "the traffic was over before anything was restarted");
        traffic
    })
}

#[test]
fn no_packet_is_lost_while_the_host_s_data_path_restarts() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let vpc = bed.topology.vpcs[0].clone();
    let _echo = udp_echo(&vpc, PORT).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    let namespace = guest.namespace.clone();
    assert_eq!(during(|it| stream(&namespace, 6000, it), || bed.reopen_host()), 0);
    let bytes = 24 << 20;
    let _source = bulk_source(&vpc, PORT, bytes, 4 << 20).expect("the server starts");
    let downloads = |restarts: &Restarts| {
        let mut are_right = download(&namespace, PORT, bytes);
        while !restarts.are_enough() {
            are_right &= download(&namespace, PORT, bytes);
        }
        are_right
    };
    assert!(during(downloads, || bed.reopen_host()));
    assert_eq!(bed.host().drops().expect("counters can be read"), []);
}

#[test]
fn no_packet_is_lost_while_the_proxy_s_data_path_restarts() {
    let mut bed = Bed::new();
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let vpc = bed.topology.vpcs[0].clone();
    let _echo = udp_echo(&vpc, PORT).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
    let namespace = guest.namespace.clone();
    let reapply = |bed: &mut Bed| {
        bed.reopen_proxy();
        bed.apply_proxy(VNI_A, vec![(PORTS, HOST)]);
    };
    assert_eq!(during(|it| stream(&namespace, 2000, it), || reapply(&mut bed)), 0);
    let sink = bulk_sink(&vpc, PORT).expect("the server starts");
    let upload = || {
        namespace.run(|| {
            let mut stream = TcpStream::connect((SERVER, PORT)).expect("the server answers");
            let bytes: Vec<u8> = (0..8u64 << 20).map(|n| (n % 251) as u8).collect();
            for piece in bytes.chunks(16384) {
                stream.write_all(piece).expect("the server reads");
                std::thread::sleep(Duration::from_millis(4));
            }
            stream.shutdown(Shutdown::Write).expect("the stream stands");
            stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
            assert_eq!(stream.read(&mut [0; 1]).expect("the server closes"), 0);
        });
    };
    let uploads = |restarts: &Restarts| {
        let mut count = 0;
        while count == 0 || !restarts.are_enough() {
            upload();
            count += 1;
        }
        count
    };
    let count = during(uploads, || reapply(&mut bed));
    assert_eq!(sink.count(), count * (8 << 20));
}

#[test]
fn what_was_known_is_known_after_a_restart() {
    let mut bed = Bed::new();
    let generation = bed.host().attach(2, VNI_B).expect("the slot is free");
    let slots = bed.host().slots().to_vec();
    let holders = vec![
        (PortRange { base: 1024, count: 128 }, HOST),
        (PortRange { base: 1152, count: 64 }, ROGUE),
        (PortRange { base: 65472, count: 64 }, HOST),
    ];
    bed.apply_proxy(VNI_A, holders.clone());
    bed.open();

    assert_eq!(bed.host().slots(), slots);
    let attachment = |slot| bed.host().attachment(slot).expect("attachments can be read");
    assert_eq!(attachment(2), Some(Attachment { vni: VNI_B, generation }));
    assert_eq!(attachment(1), None);
    let known = bed.host().vpcs().expect("VPCs can be read");
    let expected = [VNI_A, VNI_B].map(|vni| HostVpc {
        vni,
        shared_address: SHARED,
        shared_address_v6: None,
        ports: PORTS,
        proxy_address: PROXY.into(),
        proxies: Vec::new(),
    });
    assert_eq!(known, expected);
    let known = bed.topology.proxy.run(|| bed.proxy().vpcs()).expect("VPCs can be read");
    assert_eq!(known, [proxy_vpc(VNI_A, holders), proxy_vpc(VNI_B, vec![(PORTS, HOST)])]);

    bed.host().detach(2).expect("the slot can be detached");
    let again = bed.host().attach(2, VNI_B).expect("the slot is free");
    assert_ne!(again, generation);
}

#[test]
fn a_vpc_that_is_removed_leaves_its_interface_as_it_was() {
    let bed = Bed::new();
    let addresses = || bed.topology.proxy.ip_lines("addr show dev vpc-a").expect("ip runs");
    assert!(addresses().iter().any(|line| line.contains(&SHARED.to_string())));
    bed.topology.proxy.run(|| bed.proxy().remove_vpc(VNI_A)).expect("it can be removed");
    assert!(!addresses().iter().any(|line| line.contains(&SHARED.to_string())));
    let known = bed.topology.proxy.run(|| bed.proxy().vpcs()).expect("VPCs can be read");
    assert_eq!(known, [proxy_vpc(VNI_B, vec![(PORTS, HOST)])]);
    assert!(!bed.run.bpf().join("proxy/links").join(format!("vpc-{VNI_A}")).exists());
    bed.apply_proxy(VNI_A, vec![(PORTS, HOST)]);
}

#[test]
fn a_slot_is_in_one_vpc_and_a_vpc_with_slots_stays() {
    let bed = Bed::new();
    bed.host().attach(1, VNI_A).expect("the slot is free");
    assert!(matches!(bed.host().attach(1, VNI_B), Err(Error::SlotInUse { slot: 1, vni: VNI_A })));
    assert!(matches!(bed.host().remove_vpc(VNI_A), Err(Error::VpcInUse { slot: 1, .. })));
    assert!(matches!(bed.host().attach(2, 300), Err(Error::UnknownVpc(300))));
    assert!(matches!(bed.host().attach(0, VNI_A), Err(Error::NoSlot(0))));
    assert!(matches!(bed.host().attach(5, VNI_A), Err(Error::NoSlot(5))));
    bed.host().remove_vpc(VNI_B).expect("nobody is in it");
    bed.host().remove_vpc(VNI_B).expect("it is gone already");
}

#[test]
fn uninstalling_leaves_nothing() {
    let mut bed = Bed::closed();
    let links = |namespace: &Namespace| namespace.ip_lines("link show").expect("ip runs");
    let (host, proxy) = (bed.topology.host.clone(), bed.topology.proxy.clone());
    let before = (links(&host), links(&proxy));
    // The kernel has pins of its own in every BPF file system.
    let pins_before = bed.run.pins();
    bed.open();
    bed.apply_proxy(VNI_A, vec![(PORTS, HOST)]);
    assert_ne!((links(&host), links(&proxy)), before);
    let (host_options, proxy_options) = (bed.host_options(), bed.proxy_options());
    (bed.host, bed.proxy) = (None, None);
    host.run(|| HostDatapath::uninstall(&host_options)).expect("it can be uninstalled");
    proxy.run(|| ProxyDatapath::uninstall(&proxy_options)).expect("it can be uninstalled");
    assert_eq!((links(&host), links(&proxy)), before);
    assert_eq!(bed.run.pins(), pins_before);
    assert!(!bed.run.bpf().join("host").exists());
    let addresses = proxy.ip_lines("addr show dev vpc-a").expect("ip runs");
    assert!(!addresses.iter().any(|line| line.contains(&SHARED.to_string())));
    // And again, where nothing is left to remove.
    host.run(|| HostDatapath::uninstall(&host_options)).expect("there is nothing");
    proxy.run(|| ProxyDatapath::uninstall(&proxy_options)).expect("there is nothing");
}

#[test]
fn a_tap_that_was_removed_is_made_anew_and_detached() {
    let mut bed = Bed::new();
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let first = bed.host().slots()[0].clone();
    bed.host = None;
    bed.topology.host.ip("link del wrn1").expect("it is there");
    bed.reopen_host();
    assert_ne!(bed.host().slots()[0].ifindex, first.ifindex);
    assert_eq!(bed.host().attachment(1).expect("attachments can be read"), None);
    let guest = KernelGuest::plug(&bed, 1);
    bed.host().attach(1, VNI_A).expect("the slot is free");
    let _echo = udp_echo(&bed.topology.vpcs[0], PORT).expect("the server starts");
    assert!(udp_round_trip(&guest.namespace, (SERVER, PORT)));
}

#[test]
fn a_tap_has_one_owner() {
    let bed = Bed::new();
    let first = open_slot(&bed.topology.host, bed.host(), 1);
    let error = bed.topology.host.run(|| bed.host().open_tap(1)).expect_err("the TAP is taken");
    let Error::System { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.raw_os_error(), Some(libc::EBUSY));
    drop(first);
    open_slot(&bed.topology.host, bed.host(), 1);
}

#[test]
fn mistakes_in_options_are_named() {
    let bed = Bed::closed();
    let open = |change: &dyn Fn(&mut HostOptions)| {
        let mut options = bed.host_options();
        change(&mut options);
        bed.topology.host.run(|| HostDatapath::open(&options)).expect_err("it is wrong")
    };
    let plain = bed.run.path().join("plain");
    let error = open(&|options| options.bpffs.clone_from(&plain));
    assert!(matches!(&error, Error::NotBpffs { path } if *path == plain), "{error}");
    assert!(!plain.exists());
    assert!(matches!(
        open(&|options| options.underlay_interface = "none0".to_owned()),
        Error::NoInterface { name } if name == "none0"
    ));
    let changes: [&dyn Fn(&mut HostOptions); 5] = [
        &|options| options.underlay_address = ROGUE.into(),
        &|options| options.slots = 0,
        &|options| options.slots = 65278,
        &|options| options.flows = 0,
        &|options| options.interface_prefix = "much-too-long".to_owned(),
    ];
    for change in changes {
        assert!(matches!(open(change), Error::Invalid { .. }));
    }
    assert!(matches!(open(&|options| options.object.clear()), Error::Load(_)));
}

#[test]
fn mistakes_in_vpcs_are_named() {
    let bed = Bed::new();
    let good = HostVpc {
        vni: 1,
        shared_address: SHARED,
        shared_address_v6: None,
        ports: PORTS,
        proxy_address: PROXY.into(),
        proxies: Vec::new(),
    };
    for wrong in [
        HostVpc { vni: 0, ..good.clone() },
        HostVpc { vni: 1 << 24, ..good.clone() },
        HostVpc { ports: PortRange { base: 1000, count: 64 }, ..good.clone() },
        HostVpc { ports: PortRange { base: 960, count: 64 }, ..good.clone() },
        HostVpc { ports: PortRange { base: 1024, count: 65 }, ..good.clone() },
        HostVpc { ports: PortRange { base: 1024, count: 0 }, ..good.clone() },
        HostVpc { ports: PortRange { base: 65472, count: 128 }, ..good.clone() },
        HostVpc { shared_address: [224, 0, 0, 1].into(), ..good.clone() },
        HostVpc { proxy_address: Ipv4Addr::UNSPECIFIED.into(), ..good.clone() },
    ] {
        let result = bed.host().apply_vpc(&wrong);
        assert!(matches!(result, Err(Error::Invalid { .. })), "{wrong:?}: {result:?}");
    }
    let mut overlapping = proxy_vpc(VNI_A, vec![(PORTS, HOST), (PORTS, ROGUE)]);
    let apply = |vpc: &_| bed.topology.proxy.run(|| bed.proxy().apply_vpc(vpc));
    assert!(matches!(apply(&overlapping), Err(Error::Invalid { .. })));
    overlapping.holders.pop();
    overlapping.interface = "vpc-b".to_owned();
    assert!(matches!(apply(&overlapping), Err(Error::Invalid { .. })));
}
