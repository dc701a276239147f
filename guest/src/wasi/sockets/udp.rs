//! wasi:sockets/udp.

use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::Cell;

use smoltcp::socket::udp::{self as smoltcp_udp, PacketBuffer, PacketMetadata, SendError};
use smoltcp::wire::{IpEndpoint, IpListenEndpoint};
use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::State;
use super::super::bindings::wasi::sockets::network::{ErrorCode, IpAddressFamily, IpSocketAddress};
use super::super::bindings::wasi::sockets::{udp, udp_create_socket};
use super::super::io::Pollable;
use super::{Network, SocketError, only_v4, remote, socket_address};
use crate::machine::Machine;
use crate::net::Owned;
use crate::single::Single;
use crate::tcp::{ephemeral_port, untouched};

/// Room for datagrams, each way, in bytes, and how many.
const BUFFER: usize = 64 * 1024;
const DATAGRAMS: usize = 64;

/// The most that are given or taken at once.
const AT_ONCE: u64 = 32;

/// Hops of a packet, where nothing else was said.
const HOPS: u8 = 64;

/// A socket.
pub struct UdpSocket {
    stage: Stage,
    hops: u8,
}

enum Stage {
    New,
    Binding(Bound),
    Bound(Bound),
}

/// A bound socket, with its streams.
#[derive(Clone)]
struct Bound {
    socket: Single<Rc<Owned>>,
    /// The only one to send to and to receive from.
    peer: Single<Rc<Cell<Option<IpEndpoint>>>>,
}

impl Clone for Single<Rc<Owned>> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl Clone for Single<Rc<Cell<Option<IpEndpoint>>>> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl Bound {
    fn new(machine: &mut Machine, local: IpEndpoint) -> Result<Self, SocketError> {
        let port = if local.port == 0 { ephemeral_port(machine) } else { local.port };
        let buffer =
            || PacketBuffer::new(vec![PacketMetadata::EMPTY; DATAGRAMS], untouched(BUFFER));
        let mut socket = smoltcp_udp::Socket::new(buffer(), buffer());
        let to = IpListenEndpoint { addr: None, port };
        socket.bind(to).map_err(|_| ErrorCode::InvalidArgument)?;
        let socket = Single(Rc::new(machine.sockets.add(socket)));
        Ok(Self { socket, peer: Single(Rc::default()) })
    }

    fn socket<'a>(&self, machine: &'a mut Machine) -> &'a mut smoltcp_udp::Socket<'static> {
        machine.sockets.set.get_mut(self.socket.0.handle)
    }
}

/// What comes to a socket, or what goes from it.
pub struct Datagrams {
    bound: Bound,
    /// How many may be sent, as was said last.
    permitted: u64,
}

impl State {
    fn bound(&self, socket: &Resource<UdpSocket>) -> Result<Bound, SocketError> {
        match &self.table.get(socket)?.stage {
            Stage::Bound(bound) => Ok(bound.clone()),
            _ => Err(ErrorCode::InvalidState.into()),
        }
    }
}

impl udp_create_socket::Host for State {
    fn create_udp_socket(
        &mut self,
        family: IpAddressFamily,
    ) -> Result<Resource<UdpSocket>, SocketError> {
        only_v4(family)?;
        Ok(self.table.push(UdpSocket { stage: Stage::New, hops: HOPS })?)
    }
}

impl udp::Host for State {}

impl udp::HostUdpSocket for State {
    fn start_bind(
        &mut self,
        socket: Resource<UdpSocket>,
        _: Resource<Network>,
        local: IpSocketAddress,
    ) -> Result<(), SocketError> {
        let local = self.local(local)?;
        let socket = self.table.get_mut(&socket)?;
        let Stage::New = socket.stage else { return Err(ErrorCode::InvalidState.into()) };
        let bound = Bound::new(&mut self.machine, local)?;
        bound.socket(&mut self.machine).set_hop_limit(Some(socket.hops));
        socket.stage = Stage::Binding(bound);
        Ok(())
    }

    fn finish_bind(&mut self, socket: Resource<UdpSocket>) -> Result<(), SocketError> {
        let socket = self.table.get_mut(&socket)?;
        match core::mem::replace(&mut socket.stage, Stage::New) {
            Stage::Binding(bound) => {
                socket.stage = Stage::Bound(bound);
                Ok(())
            }
            other => {
                socket.stage = other;
                Err(ErrorCode::NotInProgress.into())
            }
        }
    }

    fn stream(
        &mut self,
        socket: Resource<UdpSocket>,
        peer: Option<IpSocketAddress>,
    ) -> Result<(Resource<Datagrams>, Resource<Datagrams>), SocketError> {
        let bound = self.bound(&socket)?;
        bound.peer.0.set(peer.map(remote).transpose()?);
        let mut stream = || self.table.push(Datagrams { bound: bound.clone(), permitted: 0 });
        Ok((stream()?, stream()?))
    }

    fn local_address(
        &mut self,
        socket: Resource<UdpSocket>,
    ) -> Result<IpSocketAddress, SocketError> {
        let port = self.bound(&socket)?.socket(&mut self.machine).endpoint().port;
        Ok(socket_address(IpEndpoint::new(self.own_address()?, port)))
    }

    fn remote_address(
        &mut self,
        socket: Resource<UdpSocket>,
    ) -> Result<IpSocketAddress, SocketError> {
        let peer = self.bound(&socket)?.peer.0.get();
        Ok(socket_address(peer.ok_or(ErrorCode::InvalidState)?))
    }

    fn address_family(&mut self, _: Resource<UdpSocket>) -> Result<IpAddressFamily> {
        Ok(IpAddressFamily::Ipv4)
    }

    fn unicast_hop_limit(&mut self, socket: Resource<UdpSocket>) -> Result<u8, SocketError> {
        Ok(self.table.get(&socket)?.hops)
    }

    fn set_unicast_hop_limit(
        &mut self,
        socket: Resource<UdpSocket>,
        value: u8,
    ) -> Result<(), SocketError> {
        if value == 0 {
            return Err(ErrorCode::InvalidArgument.into());
        }
        let socket = self.table.get_mut(&socket)?;
        socket.hops = value;
        if let Stage::Binding(bound) | Stage::Bound(bound) = &socket.stage {
            bound.socket(&mut self.machine).set_hop_limit(Some(value));
        }
        Ok(())
    }

    fn receive_buffer_size(&mut self, _: Resource<UdpSocket>) -> Result<u64, SocketError> {
        Ok(BUFFER as u64)
    }

    fn set_receive_buffer_size(
        &mut self,
        _: Resource<UdpSocket>,
        value: u64,
    ) -> Result<(), SocketError> {
        if value == 0 { Err(ErrorCode::InvalidArgument.into()) } else { Ok(()) }
    }

    fn send_buffer_size(&mut self, _: Resource<UdpSocket>) -> Result<u64, SocketError> {
        Ok(BUFFER as u64)
    }

    fn set_send_buffer_size(
        &mut self,
        _: Resource<UdpSocket>,
        value: u64,
    ) -> Result<(), SocketError> {
        if value == 0 { Err(ErrorCode::InvalidArgument.into()) } else { Ok(()) }
    }

    fn subscribe(&mut self, _: Resource<UdpSocket>) -> Result<Resource<Pollable>> {
        Ok(self.table.push(Pollable::when(|_| true))?)
    }

    fn drop(&mut self, socket: Resource<UdpSocket>) -> Result<()> {
        self.table.delete(socket)?;
        Ok(())
    }
}

impl udp::HostIncomingDatagramStream for State {
    fn receive(
        &mut self,
        stream: Resource<Datagrams>,
        most: u64,
    ) -> Result<Vec<udp::IncomingDatagram>, SocketError> {
        let bound = self.table.get(&stream)?.bound.clone();
        let mut datagrams = Vec::new();
        while (datagrams.len() as u64) < most.min(AT_ONCE) {
            let Ok((data, from)) = bound.socket(&mut self.machine).recv() else { break };
            let from = from.endpoint;
            if bound.peer.0.get().is_none_or(|peer| peer == from) {
                let (data, remote_address) = (data.to_vec(), socket_address(from));
                datagrams.push(udp::IncomingDatagram { data, remote_address });
            }
        }
        Ok(datagrams)
    }

    fn subscribe(&mut self, stream: Resource<Datagrams>) -> Result<Resource<Pollable>> {
        let bound = self.table.get(&stream)?.bound.clone();
        let ready = move |machine: &mut Machine| bound.socket(machine).can_recv();
        Ok(self.table.push(Pollable::when(ready))?)
    }

    fn drop(&mut self, stream: Resource<Datagrams>) -> Result<()> {
        self.table.delete(stream)?;
        Ok(())
    }
}

impl udp::HostOutgoingDatagramStream for State {
    fn check_send(&mut self, stream: Resource<Datagrams>) -> Result<u64, SocketError> {
        let stream = self.table.get_mut(&stream)?;
        let can_send = stream.bound.socket(&mut self.machine).can_send();
        stream.permitted = if can_send { AT_ONCE } else { 0 };
        Ok(stream.permitted)
    }

    fn send(
        &mut self,
        stream: Resource<Datagrams>,
        datagrams: Vec<udp::OutgoingDatagram>,
    ) -> Result<u64, SocketError> {
        let stream = self.table.get_mut(&stream)?;
        if datagrams.len() as u64 > stream.permitted {
            let text = "it sent more datagrams than check-send permitted";
            return Err(wasmtime::Error::msg(text).into());
        }
        stream.permitted -= datagrams.len() as u64;
        let mut sent = 0;
        for udp::OutgoingDatagram { data, remote_address } in datagrams {
            let to = match (remote_address, stream.bound.peer.0.get()) {
                (None, Some(peer)) => Ok(peer),
                (Some(address), None) => remote(address),
                (Some(address), Some(peer)) => match remote(address) {
                    Ok(to) if to == peer => Ok(to),
                    _ => Err(ErrorCode::InvalidArgument.into()),
                },
                (None, None) => Err(ErrorCode::InvalidArgument.into()),
            };
            let done = to.and_then(|to| {
                let sent = stream.bound.socket(&mut self.machine).send_slice(&data, to);
                sent.map_err(|error| match error {
                    SendError::BufferFull if data.len() <= BUFFER => ErrorCode::WouldBlock.into(),
                    SendError::BufferFull => ErrorCode::DatagramTooLarge.into(),
                    SendError::Unaddressable => ErrorCode::RemoteUnreachable.into(),
                })
            });
            match done {
                Ok(()) => sent += 1,
                // Those before it were sent.
                Err(_) if sent > 0 => break,
                Err(SocketError::Error(ErrorCode::WouldBlock)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }

    fn subscribe(&mut self, stream: Resource<Datagrams>) -> Result<Resource<Pollable>> {
        let bound = self.table.get(&stream)?.bound.clone();
        let ready = move |machine: &mut Machine| bound.socket(machine).can_send();
        Ok(self.table.push(Pollable::when(ready))?)
    }

    fn drop(&mut self, stream: Resource<Datagrams>) -> Result<()> {
        self.table.delete(stream)?;
        Ok(())
    }
}
