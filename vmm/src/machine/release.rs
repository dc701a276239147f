//! The release barrier, seen from the VMM: what the guest finds there, and when it is let go.

use std::io;

use vm_memory::{Bytes, GuestAddress};
use warren_abi::microvm::{
    BOOT_ADDRESS, Boot, COMMAND_LOAD, COMMAND_PARK, COMMAND_PREFAULT, COMMAND_RELEASE,
    IDENTITY_ADDRESS, Identity,
};

use super::{Exit, Machine, host};
use crate::boot::function_bytes;
use crate::clock::{monotonic_ns, wall_clock_ns};
use crate::control::{EndReason, PublicIdentity};
use crate::function::Function;
use crate::linux::pc::{GENERATION_ADDRESS, GENERATION_GSI, pulse};

impl Machine {
    /// Lets the guest take its page faults, so that it has none after the release.
    pub fn park(&mut self) -> Result<(), EndReason> {
        // The page of the identity becomes this clone's own, and the code that the release needs is
        // mapped.
        getrandom(&mut [0; 64])?;
        self.write_identity(&NOBODY)?;
        self.command(COMMAND_PREFAULT)?;
        self.run_until(Exit::Barrier)?;
        self.command(COMMAND_PARK)
    }

    /// Puts a function in its place, and lets the guest, which stands at its barrier, know of it.
    pub fn take_function(&mut self, function: &Function) -> Result<(), EndReason> {
        let write = |address, bytes: &[u8]| {
            let written = self.ram.all().write_slice(bytes, GuestAddress(address));
            written.map_err(|error| host(&error))
        };
        for segment in &function.data {
            write(segment.start, segment.bytes)?;
        }
        let place_at = BOOT_ADDRESS + std::mem::offset_of!(Boot, function) as u64;
        write(place_at, &function_bytes(&function.place))?;
        self.command(COMMAND_LOAD)?;
        self.run_until(Exit::Barrier)?;
        self.command(COMMAND_PARK)
    }

    /// Gives the guest its identity, fresh entropy and the time, and the command to go. Returns when
    /// that was (`CLOCK_MONOTONIC`, ns): the guest's own clock begins there, and it runs next.
    pub fn release(&mut self, public: &PublicIdentity) -> Result<u64, EndReason> {
        let mut entropy = [0; 64];
        getrandom(&mut entropy)?;
        let mut hostname = [0; 64];
        let length = public.hostname.len().min(hostname.len());
        hostname[..length].copy_from_slice(&public.hostname.as_bytes()[..length]);
        self.command(COMMAND_RELEASE)?;
        let wall_clock_ns = wall_clock_ns()?;
        // SAFETY: reads a counter; x86-64 always has it.
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        let tsc = tsc.wrapping_add(self.linux.as_ref().map_or(0, |linux| linux.tsc_ahead));
        let released_ns = monotonic_ns()?;
        self.write_identity(&Identity {
            wall_clock_ns,
            tsc,
            tsc_hz: self.tsc_hz,
            entropy,
            instance_id: public.instance_id,
            hostname,
            ipv4: public.ipv4,
            gateway: public.gateway,
            mac: public.mac,
            mtu: public.mtu,
        })?;
        if self.linux.is_some() {
            self.change_generation()?;
        }
        Ok(released_ns)
    }

    /// Tells the kernel of a Linux guest that it is another machine now, if it listens to that.
    fn change_generation(&self) -> Result<(), EndReason> {
        let mut generation = [0; 64];
        getrandom(&mut generation)?;
        let address = GuestAddress(GENERATION_ADDRESS);
        self.ram.all().write_slice(&generation[..16], address).map_err(|error| host(&error))?;
        pulse(&self.vm, GENERATION_GSI)
    }

    /// Sets what the guest is to do when it leaves the barrier.
    fn command(&self, command: u32) -> Result<(), EndReason> {
        let address = BOOT_ADDRESS + std::mem::offset_of!(Boot, command) as u64;
        self.ram.all().write_obj(command, GuestAddress(address)).map_err(|error| host(&error))
    }

    /// Writes the identity page.
    fn write_identity(&self, identity: &Identity) -> Result<(), EndReason> {
        // SAFETY: `Identity` is `repr(C)` and, as the assertion below keeps, without padding, so
        // all of its bytes are initialised.
        let bytes = unsafe {
            std::slice::from_raw_parts((&raw const *identity).cast::<u8>(), size_of::<Identity>())
        };
        let address = GuestAddress(IDENTITY_ADDRESS);
        self.ram.all().write_slice(bytes, address).map_err(|error| host(&error))
    }
}

fn getrandom(buffer: &mut [u8; 64]) -> Result<(), EndReason> {
    // SAFETY: the buffer has that many bytes. Up to 256 are never cut short (getrandom(2)).
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if got == buffer.len() as isize { Ok(()) } else { Err(host(&io::Error::last_os_error())) }
}

/// What is in the identity page of a parked clone.
const NOBODY: Identity = Identity {
    wall_clock_ns: 0,
    tsc: 0,
    tsc_hz: 0,
    entropy: [0; 64],
    instance_id: [0; 16],
    hostname: [0; 64],
    ipv4: [0; 4],
    gateway: [0; 4],
    mac: [0; 6],
    mtu: 0,
};

const _: () = assert!(size_of::<Identity>() == 3 * 8 + 64 + 16 + 64 + 4 + 4 + 6 + 2);
