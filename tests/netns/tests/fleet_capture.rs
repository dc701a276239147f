//! `warren capture`: what a microVM says, as it says it and as the VPC hears it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::{Child, Command, Output, Stdio};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;
use warren_netns::fleet::{Fleet, FleetOptions, GUEST, VPCS, kvm_or_skip};
use warren_netns::servers;
use warren_netns::topology::{SERVER, SHARED};

const ECHO: u16 = 7071;
const TCP: u16 = 7072;

fn command(fleet: &Fleet, words: &[&str]) -> Command {
    let mut command = fleet.cli().unwrap();
    command.args(words);
    command
}

fn warren(fleet: &Fleet, words: &[&str]) -> Output {
    command(fleet, words).output().unwrap()
}

fn done(fleet: &Fleet, words: &[&str]) -> Vec<u8> {
    let output = warren(fleet, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    output.stdout
}

fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap_or_else(|e| panic!("{e}: {}", text.escape_ascii()))
}

/// A capture that has begun.
fn capture(fleet: &Fleet, words: &[&str]) -> (Child, BufReader<std::process::ChildStderr>) {
    let words = [&["capture", "--output", "json"], words].concat();
    let mut child =
        command(fleet, &words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    assert!(line.starts_with("capturing"), "{line}");
    (child, errors)
}

/// A packet of a file: interface, source, destination, payload.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    interface: String,
    source: SocketAddr,
    destination: SocketAddr,
    payload: Vec<u8>,
}

/// The TCP and UDP packets of a file.
fn packets(file: &[u8]) -> Vec<Packet> {
    let mut reader = PcapNgReader::new(file).unwrap();
    let (mut interfaces, mut packets) = (Vec::new(), Vec::new());
    while let Some(block) = reader.next_block() {
        match block.unwrap().0 {
            Block::InterfaceDescription(interface) => {
                let name = interface.options.iter().find_map(|option| match option {
                    InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
                    _ => None,
                });
                interfaces.push(name.unwrap());
            }
            Block::EnhancedPacket(packet) => {
                let age = (std::time::UNIX_EPOCH + packet.timestamp).elapsed().unwrap();
                assert!(age.as_secs() < 600, "{age:?}");
                assert_eq!(packet.original_len as usize, packet.data.len());
                let interface = interfaces[packet.interface_id as usize].clone();
                packets.extend(packet_of(interface, &packet.data));
            }
            _ => {}
        }
    }
    assert_eq!(interfaces, ["inside", "outside"]);
    packets
}

fn packet_of(interface: String, frame: &[u8]) -> Option<Packet> {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv4(ip)) = sliced.net else { return None };
    let (source, destination) = (ip.header().source_addr(), ip.header().destination_addr());
    let (from, to, payload) = match sliced.transport? {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port(), tcp.payload()),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port(), udp.payload()),
        _ => return None,
    };
    Some(Packet {
        interface,
        source: (source, from).into(),
        destination: (destination, to).into(),
        payload: payload.to_vec(),
    })
}

/// The packets of one side.
fn side(packets: &[Packet], interface: &str) -> Vec<Packet> {
    packets.iter().filter(|packet| packet.interface == interface).cloned().collect()
}

fn payloads(packets: &[Packet]) -> Vec<&[u8]> {
    packets.iter().map(|packet| &packet.payload[..]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_of_the_nat_are_captured() {
    if !kvm_or_skip("both_sides_of_the_nat_are_captured") {
        return;
    }
    let options = FleetOptions { slots: 4, parked: 1, guest: GUEST };
    let fleet = Fleet::start(options).await.unwrap();
    let vpc = &fleet.topology.vpcs[0];
    let _echo = servers::udp_echo(vpc, ECHO).unwrap();
    let listener = vpc.run(|| TcpListener::bind(("0.0.0.0", TCP))).unwrap();
    let peers = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        stream.read_to_end(&mut Vec::new()).ok();
        peer
    });
    let run = || json(&done(&fleet, &["vm", "run", "--vpc", VPCS[0], "--output", "json"]));
    let [own, other] = [run(), run()].map(|vm| vm[0]["id"].as_str().unwrap().to_owned());
    let listed = json(&done(&fleet, &["vm", "ls", "--output", "json"]));
    let listed = listed.as_array().unwrap().iter().find(|vm| vm["id"] == *own).unwrap();
    let guest: IpAddr = listed["address"].as_str().unwrap().parse().unwrap();
    let path = fleet.run.path().join("echo.pcapng");
    let file = path.to_str().unwrap();

    let refused = warren(&fleet, &["capture", &own, "--filter", "tcp prot 80", "-w", file]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let problem = String::from_utf8_lossy(&refused.stderr);
    assert!(problem.contains("filter: ") && problem.contains("syntax error"), "{problem}");
    assert!(!path.exists(), "a wrong filter writes no file");

    // What the other one says to the same server is not shown, nor what the filter does not want.
    let filter = format!("udp port {ECHO}");
    let words = [&own[..8], "--filter", &filter, "--count", "12", "-w", file];
    let (echoes, _errors) = capture(&fleet, &words);
    let (server, tcp) = (format!("{SERVER}:{ECHO}"), format!("{SERVER}:{TCP}"));
    done(&fleet, &["vm", "probe", &other, "udp-echo", &server, "--count", "2"]);
    warren(&fleet, &["vm", "probe", &own, "tcp-connect", &format!("{SERVER}:81")]);
    done(&fleet, &["vm", "probe", &own, "udp-echo", &server, "--count", "3"]);
    let ended = echoes.wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let row = json(&ended.stdout);
    assert_eq!((&row["inside"], &row["outside"]), (&6.into(), &6.into()), "{row}");
    assert_eq!((&row["inside_lost"], &row["outside_lost"]), (&0.into(), &0.into()), "{row}");
    assert_eq!(row["ended"], "count");
    let packets = packets(&std::fs::read(&path).unwrap());
    let (inside, outside) = (side(&packets, "inside"), side(&packets, "outside"));
    assert_eq!(payloads(&inside), payloads(&outside));
    let server = SocketAddr::from((SERVER, ECHO));
    let nat = outside[0].source;
    assert_eq!(nat.ip(), SHARED);
    for (guest_side, address) in [(&inside, inside[0].source), (&outside, nat)] {
        for pair in guest_side.chunks(2) {
            assert_eq!((pair[0].source, pair[0].destination), (address, server));
            assert_eq!((pair[1].source, pair[1].destination), (server, address));
            assert_eq!(pair[0].payload, pair[1].payload, "it is an echo");
        }
    }
    assert_eq!(inside[0].source.ip(), guest);

    // To standard output, until the instance ends.
    let (mut all, mut errors) = capture(&fleet, &[&own, "-w", "-"]);
    done(&fleet, &["vm", "probe", &own, "tcp-connect", &tcp]);
    let peer = peers.join().unwrap();
    done(&fleet, &["vm", "stop", &own]);
    let mut file = Vec::new();
    all.stdout.take().unwrap().read_to_end(&mut file).unwrap();
    assert!(all.wait().unwrap().success());
    let mut row = String::new();
    errors.read_to_string(&mut row).unwrap();
    assert_eq!(json(row.as_bytes())["ended"], "instance");
    let packets = self::packets(&file);
    let hello = |interface| {
        let mut packets = side(&packets, interface);
        packets.retain(|packet| packet.payload == b"hello");
        packets[0].clone()
    };
    assert_eq!(hello("outside").destination, peer);
    assert_eq!(hello("inside").destination.ip(), guest);
    for interface in ["inside", "outside"] {
        let to_server = |packet: &Packet| packet.destination == SocketAddr::from((SERVER, TCP));
        assert!(side(&packets, interface).iter().any(to_server), "{packets:?}");
    }

    let nobody = warren(&fleet, &["capture", &own, "-w", "-"]);
    assert_eq!(nobody.status.code(), Some(4), "{nobody:?}");
}
