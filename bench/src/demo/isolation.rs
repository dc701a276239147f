//! Tries to get out of a tenant's VPC, or into another's. Each attempt has a twin that must
//! succeed, so that none passes because nothing works.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use etherparse::PacketBuilder;
use warren_abi::probe::{Endpoint, Operation, Outcome};
use warren_abi::wire::{GATEWAY_MAC, TUNNEL_MAC};
use warren_bench::figures::{Figure, Figures};
use warren_netns::capture::Capture;
use warren_netns::fleet::{Daemon, VPCS};
use warren_netns::netns::Namespace;
use warren_netns::topology::{HOST, ONLY_IN_B, PROXY, ROGUE, SERVER, SHARED};

use crate::scene::{ECHO, Scene};
use crate::starts::Starts;
use crate::step;

/// Long enough for a packet that is going to arrive.
const SETTLE: Duration = Duration::from_millis(100);
const REDIS: u16 = 6379;
const HTTP: u16 = 80;

/// Runs every attempt and adds the violations to the figure.
pub async fn check(scene: &Scene, starts: &Starts, figures: &mut Figures) -> Result<()> {
    let mut violations = match figures.get("isolation_violations") {
        Some(Figure::Count(count)) => *count,
        _ => 0,
    };
    let mut report = |what: &str, violated: bool| {
        if violated {
            eprintln!("  ✗ ISOLATION VIOLATED: {what}");
        } else {
            step(&format!("isolated: {what}"));
        }
        violations += u64::from(violated);
    };
    report("nginx at the same address serves each its own page", pages(scene, starts).await?);
    report("an address that only the other VPC has", only_in_b(scene, starts).await?);
    report("frames with a forged source, from a microVM", forged_frame(scene, starts).await?);
    report("a forged inner source in the tunnel", forged_inner(scene, starts).await?);
    report("the other tenant's VNI, without its block", foreign_vni(scene, starts).await?);
    report("a reply to a flow that ended", late_reply(scene).await?);
    figures.count("isolation_violations", violations);
    Ok(())
}

async fn pages(scene: &Scene, starts: &Starts) -> Result<bool> {
    let mut violated = false;
    for (tenant, name) in VPCS.iter().enumerate() {
        let operation = Operation::HttpGet {
            to: Endpoint { address: SERVER.octets(), port: HTTP },
            host: "shop.internal".to_owned(),
            path: "/".to_owned(),
        };
        let reply = scene.fleet.probe(&starts.of(tenant).id, operation).await?;
        match reply.outcome.map_err(|e| anyhow!("HTTP in {name}: {e}"))? {
            Outcome::Http { status: 200, body } => violated |= body != name.as_bytes(),
            other => return Err(anyhow!("nginx in {name} answered {other:?}")),
        }
    }
    Ok(violated)
}

async fn only_in_b(scene: &Scene, starts: &Starts) -> Result<bool> {
    let to = Endpoint { address: ONLY_IN_B.octets(), port: REDIS };
    let reach = async |tenant: usize| -> Result<bool> {
        let operation = Operation::TcpConnect { to };
        let request = scene.fleet.probe_within(&starts.of(tenant).id, operation, 1_000);
        Ok(request.await?.outcome.is_ok())
    };
    ensure!(reach(1).await?, "{ONLY_IN_B} is not reached from its own VPC either");
    reach(0).await
}

async fn forged_frame(scene: &Scene, starts: &Starts) -> Result<bool> {
    let start = starts.of(0);
    let mac = parse_mac(&start.instance.mac).context("no MAC in the instance")?;
    let address: Ipv4Addr = start.instance.address.parse()?;
    let send = async |mac: [u8; 6], address: Ipv4Addr| -> Result<u64> {
        let before = scene.echoes[0].count() + scene.echoes[1].count();
        let frame = PacketBuilder::ethernet2(mac, GATEWAY_MAC.octets())
            .ipv4(address.octets(), SERVER.octets(), 64)
            .udp(4000, ECHO);
        let mut bytes = Vec::new();
        frame.write(&mut bytes, b"forged")?;
        let reply = scene.fleet.probe(&start.id, Operation::SendFrame { frame: bytes }).await?;
        reply.outcome.map_err(|e| anyhow!("a frame was not sent: {e}"))?;
        tokio::time::sleep(SETTLE).await;
        Ok(scene.echoes[0].count() + scene.echoes[1].count() - before)
    };
    ensure!(send(mac, address).await? == 1, "a microVM's own frame does not arrive either");
    let neighbour: Ipv4Addr = starts.of(1).instance.address.parse()?;
    let dropped = drops(scene, Daemon::Host, &["spoofed-address", "spoofed-mac"]).await?;
    let mut arrived = send(mac, neighbour).await?;
    arrived += send(parse_mac(&starts.of(1).instance.mac).context("no MAC")?, address).await?;
    let counted = drops(scene, Daemon::Host, &["spoofed-address", "spoofed-mac"]).await?;
    Ok(arrived > 0 || counted != dropped + 2)
}

/// A VXLAN packet with a datagram for the echo server in it, as a host would send it.
fn tunnelled(vni: u32, source: Ipv4Addr, port: u16) -> Result<Vec<u8>> {
    let mut packet = vec![8, 0, 0, 0];
    packet.extend((vni << 8).to_be_bytes());
    PacketBuilder::ethernet2(TUNNEL_MAC.octets(), TUNNEL_MAC.octets())
        .ipv4(source.octets(), SERVER.octets(), 63)
        .udp(port, ECHO)
        .write(&mut packet, b"tunnelled")?;
    Ok(packet)
}

/// Sends a packet to the proxy's tunnel port; how many datagrams the VPC's server got from it.
async fn send_tunnelled(
    scene: &Scene,
    from: (&Namespace, Ipv4Addr),
    tenant: usize,
    source: Ipv4Addr,
    port: u16,
) -> Result<u64> {
    let before = scene.echoes[tenant].count();
    let packet = tunnelled(scene.vpcs[tenant].vni, source, port)?;
    let (namespace, address) = from;
    namespace.run(|| -> Result<()> {
        let socket = UdpSocket::bind((address, 0))?;
        socket.send_to(&packet, (PROXY, 4789))?;
        Ok(())
    })?;
    tokio::time::sleep(SETTLE).await;
    Ok(scene.echoes[tenant].count() - before)
}

async fn forged_inner(scene: &Scene, starts: &Starts) -> Result<bool> {
    let host = (&scene.fleet.topology.host, HOST);
    let port = starts.of(0).seen.port;
    let own = send_tunnelled(scene, host, 0, SHARED, port).await?;
    ensure!(own == 1, "the host's own tunnelled datagram does not arrive either");
    let dropped = drops(scene, Daemon::Proxy, &["spoofed-address"]).await?;
    let forged = Ipv4Addr::new(10, 0, 0, 77);
    let arrived = send_tunnelled(scene, host, 0, forged, port).await?;
    let counted = drops(scene, Daemon::Proxy, &["spoofed-address"]).await?;
    Ok(arrived > 0 || counted != dropped + 1)
}

async fn foreign_vni(scene: &Scene, starts: &Starts) -> Result<bool> {
    let port = starts.of(1).seen.port;
    let host = (&scene.fleet.topology.host, HOST);
    let own = send_tunnelled(scene, host, 1, SHARED, port).await?;
    ensure!(own == 1, "the block holder's tunnelled datagram does not arrive either");
    let dropped = drops(scene, Daemon::Proxy, &["not-block-holder"]).await?;
    let rogue = (&scene.fleet.topology.rogue, ROGUE);
    let arrived = send_tunnelled(scene, rogue, 1, SHARED, port).await?;
    let counted = drops(scene, Daemon::Proxy, &["not-block-holder"]).await?;
    Ok(arrived > 0 || counted != dropped + 1)
}

/// A server answers an instance that is gone, whose slot may have a new tenant.
async fn late_reply(scene: &Scene) -> Result<bool> {
    const PORT: u16 = 7008;
    const LATE: &[u8] = b"an answer nobody waits for";
    let socket = warren_netns::servers::udp(&scene.fleet.topology.vpcs[0], PORT)?;
    let (response, _) = scene.fleet.run(VPCS[0], None).await?;
    let instance = response.instance.context("no instance")?;
    let tap = format!("wrn{}", instance.slot);
    let capture = Capture::start(&scene.fleet.topology.host, &tap)?;

    let to = Endpoint { address: SERVER.octets(), port: PORT };
    let operation = Operation::UdpEcho { to, count: 1, length: 64, interval_us: 0 };
    let id = instance.id.clone();
    let probe = scene.fleet.probe_within(&id, operation, 500);
    let theirs = socket.try_clone()?;
    let answer = tokio::task::spawn_blocking(move || -> Result<SocketAddr> {
        let mut buffer = [0; 128];
        let received = (0..100).find_map(|_| theirs.recv_from(&mut buffer).ok());
        let (_, from) = received.context("the instance's datagram does not arrive")?;
        theirs.send_to(LATE, from)?;
        Ok(from)
    });
    // What the probe makes of an answer that is no echo is no matter here.
    probe.await?;
    let from = answer.await??;
    tokio::time::sleep(SETTLE).await;
    let seen = |capture: &Capture| -> Result<bool> {
        let frames = capture.drain()?;
        Ok(frames.iter().any(|f| f.bytes.windows(LATE.len()).any(|window| window == LATE)))
    };
    ensure!(seen(&capture)?, "the answer to a live flow does not arrive either");

    scene.fleet.stop(&id).await?;
    let reasons = ["stale-flow", "no-flow", "detached"];
    let dropped = drops(scene, Daemon::Host, &reasons).await?;
    socket.send_to(LATE, from)?;
    tokio::time::sleep(SETTLE).await;
    let counted = drops(scene, Daemon::Host, &reasons).await?;
    Ok(seen(&capture)? || counted != dropped + 1)
}

async fn drops(scene: &Scene, daemon: Daemon, reasons: &[&str]) -> Result<u64> {
    let mut sum = 0;
    for reason in reasons {
        sum += scene.fleet.drops(daemon, reason).await?;
    }
    Ok(sum)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok());
    bytes.collect::<Option<Vec<_>>>()?.try_into().ok()
}
