//! wasi:sockets/ip-name-lookup.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::net::Ipv4Addr;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::super::bindings::wasi::sockets::ip_name_lookup;
use super::super::bindings::wasi::sockets::network::{ErrorCode, IpAddress};
use super::super::io::Pollable;
use super::super::{Shared, State, shared};
use super::{Network, SocketError, ip_address};
use crate::dns::{Lookup, NoAddress};
use crate::machine::Machine;

/// The addresses of a name, as they become known.
pub struct Addresses(Shared<Answer>);

enum Answer {
    Asked(Lookup),
    Known(Vec<Ipv4Addr>),
    Failed,
}

impl Answer {
    /// Whether there is one by now.
    fn is_there(&mut self, machine: &mut Machine) -> bool {
        if let Self::Asked(lookup) = self {
            match lookup.result(machine) {
                None => return false,
                Some(Ok(mut addresses)) => {
                    addresses.reverse();
                    *self = Self::Known(addresses);
                }
                Some(Err(NoAddress)) => *self = Self::Failed,
            }
        }
        true
    }
}

impl ip_name_lookup::Host for State {
    fn resolve_addresses(
        &mut self,
        _: Resource<Network>,
        name: String,
    ) -> Result<Resource<Addresses>, SocketError> {
        let machine = self.released("the network")?;
        let answer = match name.parse::<Ipv4Addr>() {
            Ok(address) => Answer::Known(alloc::vec![address]),
            Err(_) => {
                let lookup = Lookup::start(machine, &name);
                Answer::Asked(lookup.map_err(|NoAddress| ErrorCode::InvalidArgument)?)
            }
        };
        Ok(self.table.push(Addresses(shared(answer)))?)
    }
}

impl ip_name_lookup::HostResolveAddressStream for State {
    fn resolve_next_address(
        &mut self,
        addresses: Resource<Addresses>,
    ) -> Result<Option<IpAddress>, SocketError> {
        let answer: Rc<RefCell<Answer>> = self.table.get(&addresses)?.0.0.clone();
        let mut answer = answer.borrow_mut();
        if !answer.is_there(&mut self.machine) {
            return Err(ErrorCode::WouldBlock.into());
        }
        match &mut *answer {
            Answer::Known(addresses) => Ok(addresses.pop().map(ip_address)),
            Answer::Asked(_) | Answer::Failed => Err(ErrorCode::NameUnresolvable.into()),
        }
    }

    fn subscribe(&mut self, addresses: Resource<Addresses>) -> Result<Resource<Pollable>> {
        let answer = self.table.get(&addresses)?.0.0.clone();
        let ready = move |machine: &mut Machine| answer.borrow_mut().is_there(machine);
        Ok(self.table.push(Pollable::when(ready))?)
    }

    fn drop(&mut self, addresses: Resource<Addresses>) -> Result<()> {
        self.table.delete(addresses)?;
        Ok(())
    }
}
