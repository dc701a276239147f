//! Names: asked of the VPC's resolver, at the link-local address where each host answers.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::socket::dns::{GetQueryResultError, QueryHandle, Socket};
use smoltcp::wire::{DnsQueryType, IpAddress, Ipv4Address};
use warren_abi::services;

use crate::machine::Machine;
use crate::net::Owned;

/// A query on its way.
pub struct Lookup {
    socket: Owned,
    query: Option<QueryHandle>,
}

/// There is no such name, or nobody says what its address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAddress;

impl Lookup {
    /// Asks for a name's addresses.
    pub fn start(machine: &mut Machine, name: &str) -> Result<Self, NoAddress> {
        let mut socket = Socket::new(&[IpAddress::Ipv4(services::DNS)], vec![None]);
        let query = socket.start_query(machine.interface.context(), name, DnsQueryType::A);
        let query = Some(query.map_err(|_| NoAddress)?);
        Ok(Self { socket: machine.sockets.add(socket), query })
    }

    /// What came of it; `None`: nothing yet. Afterwards there is nothing more.
    pub fn result(&mut self, machine: &mut Machine) -> Option<Result<Vec<Ipv4Address>, NoAddress>> {
        let socket = machine.sockets.set.get_mut::<Socket>(self.socket.handle);
        match socket.get_query_result(self.query?) {
            Err(GetQueryResultError::Pending) => None,
            Err(GetQueryResultError::Failed) => {
                self.query = None;
                Some(Err(NoAddress))
            }
            Ok(addresses) => {
                self.query = None;
                let v4 = addresses.into_iter().map(|IpAddress::Ipv4(address)| address);
                Some(Ok(v4.collect()))
            }
        }
    }
}
