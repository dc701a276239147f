//! wasi:sockets: TCP, UDP and names, in the VPC. Nobody in the VPC can connect to a function: to listen
//! is not supported.

mod lookup;
mod tcp;
mod udp;

use smoltcp::wire::{IpAddress as WireAddress, IpEndpoint, Ipv4Address};
use wasmtime::Result;
use wasmtime::component::Resource;

use super::bindings::wasi::sockets::instance_network;
use super::bindings::wasi::sockets::network::{
    self, ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress,
};
use super::{Failure, State};

pub use lookup::Addresses;
pub use tcp::TcpSocket;
pub use udp::{Datagrams, UdpSocket};

pub type SocketError = Failure<ErrorCode>;

impl From<ErrorCode> for SocketError {
    fn from(error: ErrorCode) -> Self {
        Self::Error(error)
    }
}

/// The network: there is one.
pub struct Network;

impl instance_network::Host for State {
    fn instance_network(&mut self) -> Result<Resource<Network>> {
        Ok(self.table.push(Network)?)
    }
}

impl network::Host for State {
    fn convert_error_code(&mut self, error: SocketError) -> Result<ErrorCode> {
        error.convert()
    }
}

impl network::HostNetwork for State {
    fn drop(&mut self, network: Resource<Network>) -> Result<()> {
        self.table.delete(network)?;
        Ok(())
    }
}

impl State {
    /// The microVM's own address.
    fn own_address(&mut self) -> Result<WireAddress> {
        Ok(Ipv4Address::from(self.released("the network")?.identity.ipv4).into())
    }

    /// Where a socket is to be bound to.
    fn local(&mut self, address: IpSocketAddress) -> Result<IpEndpoint, SocketError> {
        let local = endpoint(address)?;
        let own = self.own_address()?;
        if !local.addr.is_unspecified() && local.addr != own {
            return Err(ErrorCode::AddressNotBindable.into());
        }
        Ok(local)
    }
}

/// Guests have IPv4 addresses.
fn only_v4(family: IpAddressFamily) -> Result<(), SocketError> {
    match family {
        IpAddressFamily::Ipv4 => Ok(()),
        IpAddressFamily::Ipv6 => Err(ErrorCode::NotSupported.into()),
    }
}

/// Where a socket is to send to.
fn remote(address: IpSocketAddress) -> Result<IpEndpoint, SocketError> {
    let endpoint = endpoint(address)?;
    if endpoint.addr.is_unspecified() || endpoint.port == 0 {
        return Err(ErrorCode::InvalidArgument.into());
    }
    Ok(endpoint)
}

fn endpoint(address: IpSocketAddress) -> Result<IpEndpoint, SocketError> {
    match address {
        IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address: (a, b, c, d) }) => {
            Ok(IpEndpoint::new(WireAddress::Ipv4(Ipv4Address::new(a, b, c, d)), port))
        }
        IpSocketAddress::Ipv6(_) => Err(ErrorCode::InvalidArgument.into()),
    }
}

/// The same as the interface has it.
fn socket_address(endpoint: IpEndpoint) -> IpSocketAddress {
    let WireAddress::Ipv4(address) = endpoint.addr;
    let [a, b, c, d] = address.octets();
    IpSocketAddress::Ipv4(Ipv4SocketAddress { port: endpoint.port, address: (a, b, c, d) })
}

fn ip_address(address: Ipv4Address) -> IpAddress {
    let [a, b, c, d] = address.octets();
    IpAddress::Ipv4((a, b, c, d))
}
