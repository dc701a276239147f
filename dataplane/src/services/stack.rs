//! A TCP/IP stack for one guest's or one VPC's packets: smoltcp under tokio's interfaces.
//!
//! Nothing is shared between stacks, so that nobody's connections outlive or starve another's.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::State;
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint, Ipv4Packet};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_tun::Tun;
use warren_abi::wire::Be16;

/// Packets that wait for the stack, at most.
const QUEUE: usize = 64;
/// A peer that acknowledges nothing for so long is gone.
const TCP_TIMEOUT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(10);
/// How long a connection that was closed waits for the peer to have everything.
const LINGER: Duration = Duration::from_secs(3);
/// Buffers of a TCP socket, in bytes.
const TCP_BUFFERS: (usize, usize) = (2048, 4096);
/// Datagrams that a UDP socket holds in each direction.
const DATAGRAMS: usize = 16;
/// Longest datagram, in bytes: what a tunnel with the smallest MTU in use carries whole, and what
/// DNS is advised to use (DNS flag day 2020).
pub const DATAGRAM: usize = 1232;

/// Where packets leave.
#[derive(Clone)]
pub struct Outlet {
    /// The device.
    pub tun: Arc<Tun>,
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// What each packet's identification field says.
    pub stamp: Be16,
}

/// A stack. It works while [`Stack::run`] does.
pub struct Stack {
    inner: Mutex<Inner>,
    wake: Notify,
}

struct Inner {
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    is_open: bool,
}

/// The device, as smoltcp sees it.
struct Link {
    outlet: Outlet,
    received: VecDeque<Vec<u8>>,
}

impl Stack {
    /// A stack with these addresses, at most two.
    pub fn new(addresses: &[Ipv4Addr], outlet: Outlet) -> Arc<Self> {
        let mut link = Link { outlet, received: VecDeque::new() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = rand::random();
        let mut interface = Interface::new(config, &mut link, Instant::now());
        interface.update_ip_addrs(|list| {
            for address in addresses {
                // It holds two.
                list.push(IpCidr::new(IpAddress::Ipv4(*address), 32)).ok();
            }
        });
        let sockets = SocketSet::new(Vec::new());
        let inner = Mutex::new(Inner { interface, sockets, link, is_open: true });
        Arc::new(Self { inner, wake: Notify::new() })
    }

    /// Gives it a packet that came. One too many is lost.
    pub fn receive(&self, packet: &[u8]) {
        let mut inner = self.lock();
        if inner.link.received.len() < QUEUE {
            inner.link.received.push_back(packet.to_vec());
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// Ends it, without another packet: what waits on its sockets fails.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.is_open = false;
        inner.link.received.clear();
        for (_, socket) in inner.sockets.iter_mut() {
            // Both wake who waits.
            match socket {
                smoltcp::socket::Socket::Tcp(socket) => socket.abort(),
                smoltcp::socket::Socket::Udp(socket) => socket.close(),
            }
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// Does its work until it is closed.
    pub async fn run(self: Arc<Self>) {
        loop {
            let delay = {
                let mut inner = self.lock();
                if !inner.is_open {
                    return;
                }
                let Inner { interface, sockets, link, .. } = &mut *inner;
                let now = Instant::now();
                interface.poll(now, link, sockets);
                interface.poll_delay(now, sockets)
            };
            match delay {
                Some(delay) => {
                    let sleep = tokio::time::sleep(delay.into());
                    tokio::select! { () = sleep => {}, () = self.wake.notified() => {} }
                }
                None => self.wake.notified().await,
            }
        }
    }

    /// A socket for one connection to a port, which [`TcpStream::accepted`] waits for. Others that
    /// come meanwhile are refused, unless there are more such sockets.
    pub fn listen(
        self: &Arc<Self>,
        address: Ipv4Addr,
        port: u16,
        hop_limit: u8,
    ) -> io::Result<TcpStream> {
        self.tcp(hop_limit, |_, socket| socket.listen((address, port)).map_err(io::Error::other))
    }

    /// Connects, from a port of its own.
    pub async fn connect(self: &Arc<Self>, to: SocketAddrV4) -> io::Result<TcpStream> {
        let local_port: u16 = rand::random_range(1024..=u16::MAX);
        let to = IpEndpoint::new(IpAddress::Ipv4(*to.ip()), to.port());
        let stream = self.tcp(64, |interface, socket| {
            socket.connect(interface.context(), to, local_port).map_err(io::Error::other)
        })?;
        stream
            .until(|socket| match socket.state() {
                State::Closed => Err(io::ErrorKind::ConnectionRefused.into()),
                _ => Ok(socket.may_send()),
            })
            .await?;
        Ok(stream)
    }

    /// A UDP socket on a port of an address of this stack's.
    pub fn bind(self: &Arc<Self>, address: Ipv4Addr, port: u16) -> io::Result<UdpSocket> {
        let buffer = || {
            let metadata = vec![udp::PacketMetadata::EMPTY; DATAGRAMS];
            udp::PacketBuffer::new(metadata, vec![0; 4 * DATAGRAM])
        };
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind((address, port)).map_err(io::Error::other)?;
        let mut inner = self.lock();
        if !inner.is_open {
            return Err(closed());
        }
        let handle = inner.sockets.add(socket);
        drop(inner);
        Ok(UdpSocket { stack: self.clone(), handle })
    }

    fn tcp(
        self: &Arc<Self>,
        hop_limit: u8,
        open: impl FnOnce(&mut Interface, &mut tcp::Socket<'_>) -> io::Result<()>,
    ) -> io::Result<TcpStream> {
        let (receive, send) = TCP_BUFFERS;
        let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
        let mut socket = tcp::Socket::new(buffer(receive), buffer(send));
        socket.set_timeout(Some(TCP_TIMEOUT));
        socket.set_nagle_enabled(false);
        socket.set_hop_limit(Some(hop_limit));
        let mut inner = self.lock();
        if !inner.is_open {
            return Err(closed());
        }
        open(&mut inner.interface, &mut socket)?;
        let handle = inner.sockets.add(socket);
        drop(inner);
        self.wake.notify_one();
        Ok(TcpStream { stack: self.clone(), handle })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

/// A TCP connection. Dropping it forgets it; [`TcpStream::finish`] closes it.
pub struct TcpStream {
    stack: Arc<Stack>,
    handle: SocketHandle,
}

impl TcpStream {
    /// Waits until somebody connected to a socket that listens.
    pub async fn accepted(&self) -> io::Result<()> {
        // It closes without a connection if one was begun and not brought about.
        self.until(|socket| Ok(socket.may_send() || !socket.is_open())).await
    }

    /// Closes it in order: what was written is delivered, if the peer takes it within a few
    /// seconds.
    pub async fn finish(self) {
        let done = self.until(|socket| {
            socket.close();
            Ok(matches!(socket.state(), State::Closed | State::FinWait2 | State::TimeWait))
        });
        tokio::time::timeout(LINGER, done).await.ok();
    }

    /// Waits until the socket is so, as tried whenever it changes.
    async fn until(
        &self,
        mut is_so: impl FnMut(&mut tcp::Socket<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        poll_fn(|cx| {
            self.with(|socket| match is_so(socket) {
                Ok(false) => {
                    // State changes wake both.
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
                Ok(true) => Poll::Ready(Ok(())),
                Err(error) => Poll::Ready(Err(error)),
            })
        })
        .await
    }

    /// Does something with the socket, and has the stack look at it.
    fn with<T>(
        &self,
        f: impl FnOnce(&mut tcp::Socket<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let mut inner = self.stack.lock();
        if !inner.is_open {
            return Poll::Ready(Err(closed()));
        }
        let result = f(inner.sockets.get_mut(self.handle));
        drop(inner);
        self.stack.wake.notify_one();
        result
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        self.stack.lock().sockets.remove(self.handle);
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|socket| {
            if socket.can_recv() {
                let result = socket.recv_slice(buffer.initialize_unfilled());
                let length = result.map_err(io::Error::other)?;
                buffer.advance(length);
                Poll::Ready(Ok(()))
            } else if socket.may_recv() {
                socket.register_recv_waker(cx.waker());
                Poll::Pending
            } else {
                // The peer closed its side.
                Poll::Ready(Ok(()))
            }
        })
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|socket| {
            if !socket.may_send() {
                Poll::Ready(Err(closed()))
            } else if socket.can_send() {
                Poll::Ready(socket.send_slice(bytes).map_err(io::Error::other))
            } else {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| {
            socket.close();
            Poll::Ready(Ok(()))
        })
    }
}

/// A UDP socket.
pub struct UdpSocket {
    stack: Arc<Stack>,
    handle: SocketHandle,
}

impl UdpSocket {
    /// The next datagram, and who sent it.
    pub async fn receive(&self) -> io::Result<(Vec<u8>, SocketAddrV4)> {
        poll_fn(|cx| {
            let mut inner = self.stack.lock();
            if !inner.is_open {
                return Poll::Ready(Err(closed()));
            }
            let socket = inner.sockets.get_mut::<udp::Socket<'_>>(self.handle);
            if let Ok((bytes, metadata)) = socket.recv() {
                let IpAddress::Ipv4(address) = metadata.endpoint.addr;
                let from = SocketAddrV4::new(address, metadata.endpoint.port);
                Poll::Ready(Ok((bytes.to_vec(), from)))
            } else {
                socket.register_recv_waker(cx.waker());
                Poll::Pending
            }
        })
        .await
    }

    /// Sends a datagram; it waits for room.
    pub async fn send(&self, bytes: &[u8], to: SocketAddrV4) -> io::Result<()> {
        let to = IpEndpoint::new(IpAddress::Ipv4(*to.ip()), to.port());
        poll_fn(|cx| {
            let mut inner = self.stack.lock();
            if !inner.is_open {
                return Poll::Ready(Err(closed()));
            }
            let socket = inner.sockets.get_mut::<udp::Socket<'_>>(self.handle);
            let sent = match socket.send_slice(bytes, to) {
                Err(udp::SendError::BufferFull) if bytes.len() <= DATAGRAM => {
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
                sent => Poll::Ready(sent.map_err(io::Error::other)),
            };
            drop(inner);
            self.stack.wake.notify_one();
            sent
        })
        .await
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        self.stack.lock().sockets.remove(self.handle);
    }
}

impl Device for Link {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sender<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sender(&self.outlet)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        Some(Sender(&self.outlet))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.outlet.mtu.into();
        capabilities
    }
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sender<'a>(&'a Outlet);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut bytes = vec![0; length];
        let result = f(&mut bytes);
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes);
        packet.set_ident(self.0.stamp.get());
        packet.fill_checksum();
        // What the device does not take is lost, as on any wire.
        let _ = self.0.tun.try_send(&bytes);
        result
    }
}
