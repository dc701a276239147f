//! A slot that goes from tenant to tenant, over and over: nothing late of one gets into the other's
//! network, and nothing to the one comes to the other.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use etherparse::{SlicedPacket, TransportSlice};
use warren_netns::capture::{Capture, vni};
use warren_netns::servers::udp;
use warren_netns::topology::{SERVER, UNDERLAY};

use crate::bed::{Bed, VNI_A, VNI_B, eventually};
use crate::guest::{PATIENCE, RawGuest, frame};

const PORT: u16 = 7000;
/// Tenants of the slot, one after the other.
const TENANTS: u8 = 100;

/// The VPC of a tenant.
fn vpc(tenant: u8) -> usize {
    usize::from(tenant % 2)
}

/// The tenant that a frame's UDP payload names.
fn tenant(frame: &[u8]) -> Option<u8> {
    match SlicedPacket::from_ethernet(frame).ok()?.transport? {
        TransportSlice::Udp(udp) => udp.payload().first().copied(),
        _ => None,
    }
}

#[test]
fn nothing_late_of_a_former_tenant_is_taken_for_the_new_one_s() {
    let bed = Bed::new();
    let underlay = Capture::start(&bed.topology.proxy, UNDERLAY).expect("captures can be made");
    let stop = AtomicBool::new(false);
    // Everybody who ever spoke to a VPC's server hears from it without end: in either VPC, replies
    // to all former tenants of the slot arrive all the time.
    let clients = [const { Mutex::new(BTreeSet::<(SocketAddr, u8)>::new()) }; 2];
    let late = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for (namespace, clients) in bed.topology.vpcs.iter().zip(&clients) {
            let socket = udp(namespace, PORT).expect("the port is free");
            socket.set_read_timeout(Some(Duration::from_millis(1))).expect("it is not zero");
            let (stop, late) = (&stop, &late);
            scope.spawn(move || {
                let mut payload = [0; 8];
                while !stop.load(Ordering::SeqCst) {
                    while let Ok((_, from)) = socket.recv_from(&mut payload) {
                        clients.lock().expect("no one panics").insert((from, payload[0]));
                    }
                    for (to, tenant) in clients.lock().expect("no one panics").iter() {
                        socket.send_to(&[*tenant; 8], to).ok();
                        late.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
        let everything = || {
            let mut generations = BTreeSet::new();
            for tenant in 0..TENANTS {
                // Not before the former tenant closed it.
                let guest = RawGuest::open(&bed, 1);
                let generation = bed.host().attach(1, [VNI_A, VNI_B][vpc(tenant)]);
                assert!(generations.insert(generation.expect("the slot is free")));
                // All tenants have the same address, port and peer.
                let datagram = frame(guest.packet(SERVER, 64).udp(1000, PORT), &[tenant; 8]);
                let own = || {
                    guest.send(&datagram);
                    let reply = guest.receive(Duration::from_millis(20))?;
                    assert_eq!(self::tenant(&reply), Some(tenant), "a reply to another tenant");
                    Some(())
                };
                eventually(|| own().is_some());
                // It goes on while it is detached, and a moment longer.
                std::thread::scope(|scope| {
                    let sender = scope.spawn(|| (0..200).for_each(|_| guest.send(&datagram)));
                    bed.host().detach(1).expect("it is attached");
                    sender.join().expect("it does not panic");
                });
                while let Some(frame) = guest.receive(Duration::ZERO) {
                    assert_eq!(self::tenant(&frame), Some(tenant), "a reply to another tenant");
                }
                drop(guest);
            }
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(everything));
        stop.store(true, Ordering::SeqCst);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });

    assert!(late.load(Ordering::SeqCst) > u32::from(TENANTS));
    for (index, clients) in clients.iter().enumerate() {
        for (from, tenant) in clients.lock().expect("no one panics").iter() {
            assert_eq!(vpc(*tenant), index, "{from} is tenant {tenant}'s");
        }
    }
    let mut seen = BTreeSet::new();
    for frame in underlay.drain().expect("the capture can be read") {
        let Some(vni) = vni(&frame.bytes) else { continue };
        let tenant = tenant(&frame.bytes[50..]).expect("all of it is these datagrams");
        assert_eq!(vni, [VNI_A, VNI_B][vpc(tenant)], "tenant {tenant} in the other's network");
        seen.insert(tenant);
    }
    assert!(seen.len() > 2, "the capture saw {} tenants", seen.len());
}

#[test]
fn a_connection_of_a_former_tenant_ends_with_it() {
    let bed = Bed::new();
    let guest = RawGuest::open(&bed, 1);
    let segment = |flags: &dyn Fn(etherparse::PacketBuilderStep<etherparse::TcpHeader>) -> _| {
        frame(flags(guest.packet(SERVER, 64).tcp(1000, PORT, 1, 64240)), &[])
    };
    let (syn, ack) = (segment(&|tcp| tcp.syn()), segment(&|tcp| tcp.ack(1)));
    for round in 0..20 {
        bed.host().attach(1, VNI_A).expect("the slot is free");
        guest.send(&syn);
        // Nobody listens there: the server's kernel refuses.
        assert!(guest.receive(PATIENCE).is_some());
        let underlay = Capture::start(&bed.topology.proxy, UNDERLAY).expect("it can be made");
        guest.send(&ack);
        bed.host().detach(1).expect("it is attached");
        for vpc in [VNI_A, VNI_B] {
            bed.host().attach(1, vpc).expect("the slot is free");
            let before = bed.host_drops(1, warren_dataplane::datapath::DropReason::NoFlow);
            guest.send(&ack);
            let after = bed.host_drops(1, warren_dataplane::datapath::DropReason::NoFlow);
            assert_eq!(after, before + 1, "round {round}");
            bed.host().detach(1).expect("it is attached");
        }
        let ours = underlay.drain().expect("it can be read").into_iter();
        let acks = ours.filter(|frame| {
            vni(&frame.bytes).is_some() && frame.bytes.len() > 50 + 30 && {
                // From the host, not the server's answer.
                frame.bytes[26..30] == warren_netns::topology::HOST.octets()
            }
        });
        assert_eq!(acks.count(), 1, "only the one of the tenant whose connection it was");
        while guest.receive(Duration::from_millis(1)).is_some() {}
    }
}
