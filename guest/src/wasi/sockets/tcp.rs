//! wasi:sockets/tcp.

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;

use smoltcp::time::Duration;
use smoltcp::wire::IpEndpoint;
use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::bindings::wasi::sockets::network::{ErrorCode, IpAddressFamily, IpSocketAddress};
use super::super::bindings::wasi::sockets::{tcp, tcp_create_socket};
use super::super::io::{InputStream, OutputStream, Pollable};
use super::super::{Shared, State, shared};
use super::{Network, SocketError, only_v4, remote, socket_address};
use crate::machine::Machine;
use crate::stream::{End, Sink, Source};
use crate::tcp::Tcp;

/// Hops of a packet, where nothing else was said (RFC 1700).
const HOPS: u8 = 64;

/// Nanoseconds between probes of an idle connection, where nothing else was said.
const KEEP_ALIVE_NS: u64 = 75_000_000_000;

/// A socket.
pub struct TcpSocket {
    stage: Stage,
    port: Option<u16>,
    hops: u8,
    keep_alive: bool,
    keep_alive_ns: u64,
    /// What was asked for; what there is does not change.
    buffers: (u64, u64),
}

enum Stage {
    New,
    Binding,
    Bound,
    Connecting(Shared<Tcp>, IpEndpoint),
    Connected(Shared<Tcp>, IpEndpoint),
    Failed,
}

/// The half of a connection that comes.
struct Reader(Rc<RefCell<Tcp>>);

impl Source for Reader {
    fn read(&mut self, machine: &mut Machine, limit: usize) -> Result<Vec<u8>, End> {
        self.0.borrow_mut().read(machine, limit)
    }

    fn is_ready(&mut self, machine: &mut Machine) -> bool {
        self.0.borrow().has_received(machine)
    }
}

/// The half of a connection that goes: the other side sees its end when this is dropped.
struct Writer(Rc<RefCell<Tcp>>);

impl Sink for Writer {
    fn room(&mut self, machine: &mut Machine) -> Result<usize, End> {
        self.0.borrow().room(machine)
    }

    fn write(&mut self, machine: &mut Machine, bytes: &[u8]) -> Result<(), End> {
        self.0.borrow_mut().write(machine, bytes)
    }
}

impl TcpSocket {
    fn new() -> Self {
        Self {
            stage: Stage::New,
            port: None,
            hops: HOPS,
            keep_alive: false,
            keep_alive_ns: KEEP_ALIVE_NS,
            buffers: (128 * 1024, 128 * 1024),
        }
    }

    /// Sets what was asked for.
    fn apply(&self, machine: &mut Machine) {
        if let Stage::Connecting(tcp, _) | Stage::Connected(tcp, _) = &self.stage {
            let tcp = tcp.0.borrow();
            let socket = tcp.socket(machine);
            let every = Duration::from_micros(self.keep_alive_ns / 1000);
            socket.set_keep_alive(self.keep_alive.then_some(every));
            socket.set_hop_limit(Some(self.hops));
        }
    }
}

impl State {
    /// Changes a setting of a socket.
    fn set(
        &mut self,
        socket: &Resource<TcpSocket>,
        change: impl FnOnce(&mut TcpSocket),
    ) -> Result<(), SocketError> {
        let socket = self.table.get_mut(socket)?;
        change(socket);
        socket.apply(&mut self.machine);
        Ok(())
    }
}

impl tcp_create_socket::Host for State {
    fn create_tcp_socket(
        &mut self,
        family: IpAddressFamily,
    ) -> Result<Resource<TcpSocket>, SocketError> {
        only_v4(family)?;
        Ok(self.table.push(TcpSocket::new())?)
    }
}

impl tcp::Host for State {}

impl tcp::HostTcpSocket for State {
    fn start_bind(
        &mut self,
        socket: Resource<TcpSocket>,
        _: Resource<Network>,
        local: IpSocketAddress,
    ) -> Result<(), SocketError> {
        let local = self.local(local)?;
        let socket = self.table.get_mut(&socket)?;
        let Stage::New = socket.stage else { return Err(ErrorCode::InvalidState.into()) };
        socket.port = (local.port != 0).then_some(local.port);
        socket.stage = Stage::Binding;
        Ok(())
    }

    fn finish_bind(&mut self, socket: Resource<TcpSocket>) -> Result<(), SocketError> {
        let socket = self.table.get_mut(&socket)?;
        let Stage::Binding = socket.stage else { return Err(ErrorCode::NotInProgress.into()) };
        socket.stage = Stage::Bound;
        Ok(())
    }

    fn start_connect(
        &mut self,
        socket: Resource<TcpSocket>,
        _: Resource<Network>,
        to: IpSocketAddress,
    ) -> Result<(), SocketError> {
        let to = remote(to)?;
        self.released("the network")?;
        let socket = self.table.get_mut(&socket)?;
        let (Stage::New | Stage::Bound) = socket.stage else {
            return Err(ErrorCode::InvalidState.into());
        };
        let connection = Tcp::connect(&mut self.machine, to, socket.port);
        let connection = connection.map_err(|_| ErrorCode::RemoteUnreachable)?;
        socket.stage = Stage::Connecting(shared(connection), to);
        socket.apply(&mut self.machine);
        Ok(())
    }

    fn finish_connect(
        &mut self,
        socket: Resource<TcpSocket>,
    ) -> Result<(Resource<InputStream>, Resource<OutputStream>), SocketError> {
        let socket = self.table.get_mut(&socket)?;
        let Stage::Connecting(connection, to) = &socket.stage else {
            return Err(ErrorCode::NotInProgress.into());
        };
        let (connection, to) = (connection.0.clone(), *to);
        let is_connected = connection.borrow_mut().is_connected(&mut self.machine);
        match is_connected {
            None => return Err(ErrorCode::WouldBlock.into()),
            Some(false) => {
                socket.stage = Stage::Failed;
                return Err(ErrorCode::ConnectionRefused.into());
            }
            Some(true) => {}
        }
        socket.stage = Stage::Connected(crate::single::Single(connection.clone()), to);
        let input = InputStream::new(Rc::new(RefCell::new(Reader(connection.clone()))));
        let output = OutputStream::new(Rc::new(RefCell::new(Writer(connection))));
        Ok((self.table.push(input)?, self.table.push(output)?))
    }

    fn start_listen(&mut self, _: Resource<TcpSocket>) -> Result<(), SocketError> {
        Err(ErrorCode::NotSupported.into())
    }

    fn finish_listen(&mut self, _: Resource<TcpSocket>) -> Result<(), SocketError> {
        Err(ErrorCode::NotInProgress.into())
    }

    fn accept(
        &mut self,
        _: Resource<TcpSocket>,
    ) -> Result<(Resource<TcpSocket>, Resource<InputStream>, Resource<OutputStream>), SocketError>
    {
        Err(ErrorCode::InvalidState.into())
    }

    fn local_address(
        &mut self,
        socket: Resource<TcpSocket>,
    ) -> Result<IpSocketAddress, SocketError> {
        let own = self.own_address()?;
        let socket = self.table.get(&socket)?;
        let local = match &socket.stage {
            Stage::Connecting(tcp, _) | Stage::Connected(tcp, _) => {
                tcp.0.borrow().socket(&mut self.machine).local_endpoint()
            }
            Stage::Bound => Some(IpEndpoint::new(own, socket.port.unwrap_or_default())),
            _ => None,
        };
        Ok(socket_address(local.ok_or(ErrorCode::InvalidState)?))
    }

    fn remote_address(
        &mut self,
        socket: Resource<TcpSocket>,
    ) -> Result<IpSocketAddress, SocketError> {
        match &self.table.get(&socket)?.stage {
            Stage::Connected(_, to) => Ok(socket_address(*to)),
            _ => Err(ErrorCode::InvalidState.into()),
        }
    }

    fn is_listening(&mut self, _: Resource<TcpSocket>) -> Result<bool> {
        Ok(false)
    }

    fn address_family(&mut self, _: Resource<TcpSocket>) -> Result<IpAddressFamily> {
        Ok(IpAddressFamily::Ipv4)
    }

    fn set_listen_backlog_size(
        &mut self,
        _: Resource<TcpSocket>,
        _: u64,
    ) -> Result<(), SocketError> {
        Err(ErrorCode::NotSupported.into())
    }

    fn keep_alive_enabled(&mut self, socket: Resource<TcpSocket>) -> Result<bool, SocketError> {
        Ok(self.table.get(&socket)?.keep_alive)
    }

    fn set_keep_alive_enabled(
        &mut self,
        socket: Resource<TcpSocket>,
        value: bool,
    ) -> Result<(), SocketError> {
        self.set(&socket, |socket| socket.keep_alive = value)
    }

    fn keep_alive_idle_time(&mut self, socket: Resource<TcpSocket>) -> Result<u64, SocketError> {
        Ok(self.table.get(&socket)?.keep_alive_ns)
    }

    fn set_keep_alive_idle_time(
        &mut self,
        socket: Resource<TcpSocket>,
        value: u64,
    ) -> Result<(), SocketError> {
        if value == 0 {
            return Err(ErrorCode::InvalidArgument.into());
        }
        self.set(&socket, |socket| socket.keep_alive_ns = value)
    }

    fn keep_alive_interval(&mut self, socket: Resource<TcpSocket>) -> Result<u64, SocketError> {
        Ok(self.table.get(&socket)?.keep_alive_ns)
    }

    fn set_keep_alive_interval(
        &mut self,
        socket: Resource<TcpSocket>,
        value: u64,
    ) -> Result<(), SocketError> {
        tcp::HostTcpSocket::set_keep_alive_idle_time(self, socket, value)
    }

    fn keep_alive_count(&mut self, _: Resource<TcpSocket>) -> Result<u32, SocketError> {
        Ok(1)
    }

    fn set_keep_alive_count(
        &mut self,
        _: Resource<TcpSocket>,
        value: u32,
    ) -> Result<(), SocketError> {
        if value == 0 { Err(ErrorCode::InvalidArgument.into()) } else { Ok(()) }
    }

    fn hop_limit(&mut self, socket: Resource<TcpSocket>) -> Result<u8, SocketError> {
        Ok(self.table.get(&socket)?.hops)
    }

    fn set_hop_limit(&mut self, socket: Resource<TcpSocket>, value: u8) -> Result<(), SocketError> {
        if value == 0 {
            return Err(ErrorCode::InvalidArgument.into());
        }
        self.set(&socket, |socket| socket.hops = value)
    }

    fn receive_buffer_size(&mut self, socket: Resource<TcpSocket>) -> Result<u64, SocketError> {
        Ok(self.table.get(&socket)?.buffers.0)
    }

    fn set_receive_buffer_size(
        &mut self,
        socket: Resource<TcpSocket>,
        value: u64,
    ) -> Result<(), SocketError> {
        if value == 0 {
            return Err(ErrorCode::InvalidArgument.into());
        }
        self.set(&socket, |socket| socket.buffers.0 = value)
    }

    fn send_buffer_size(&mut self, socket: Resource<TcpSocket>) -> Result<u64, SocketError> {
        Ok(self.table.get(&socket)?.buffers.1)
    }

    fn set_send_buffer_size(
        &mut self,
        socket: Resource<TcpSocket>,
        value: u64,
    ) -> Result<(), SocketError> {
        if value == 0 {
            return Err(ErrorCode::InvalidArgument.into());
        }
        self.set(&socket, |socket| socket.buffers.1 = value)
    }

    fn subscribe(&mut self, socket: Resource<TcpSocket>) -> Result<Resource<Pollable>> {
        let pollable = match &self.table.get(&socket)?.stage {
            Stage::Connecting(connection, _) => {
                let connection = connection.0.clone();
                Pollable::when(move |machine| {
                    connection.borrow_mut().is_connected(machine).is_some()
                })
            }
            _ => Pollable::when(|_| true),
        };
        Ok(self.table.push(pollable)?)
    }

    fn shutdown(
        &mut self,
        socket: Resource<TcpSocket>,
        how: tcp::ShutdownType,
    ) -> Result<(), SocketError> {
        let Stage::Connected(connection, _) = &self.table.get(&socket)?.stage else {
            return Err(ErrorCode::InvalidState.into());
        };
        // What still comes is not read: to say so to the other side, TCP has nothing.
        if let tcp::ShutdownType::Send | tcp::ShutdownType::Both = how {
            connection.0.borrow().socket(&mut self.machine).close();
        }
        Ok(())
    }

    fn drop(&mut self, socket: Resource<TcpSocket>) -> Result<()> {
        self.table.delete(socket)?;
        Ok(())
    }
}
