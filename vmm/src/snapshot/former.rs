//! Headers of version 3: a network device had one pair of queues, and a diff had no function.

use serde::Deserialize;

use super::diff;
use crate::cpu::CpuState;
use crate::devices::mmio::MmioState;
use crate::machine::{LinuxState, MachineState};
use crate::memory::Pages;

/// [`super::Header`].
#[derive(Deserialize)]
pub struct Template {
    abi_version: u32,
    cpu_features: Vec<String>,
    machine: Machine,
    disk: Option<[u8; 32]>,
    working_set: Vec<Pages>,
    in_place: Vec<Pages>,
}

/// [`diff::Header`].
#[derive(Deserialize)]
pub struct Diff {
    abi_version: u32,
    template: [u8; 32],
    machine: Machine,
}

/// [`MachineState`].
#[derive(Deserialize)]
struct Machine {
    cpu: CpuState,
    net: MmioState,
    vsock: MmioState,
    linux: Option<LinuxState>,
}

impl From<Machine> for MachineState {
    fn from(Machine { cpu, net, vsock, linux }: Machine) -> Self {
        Self { cpu, net: net.into(), vsock, linux }
    }
}

impl From<Template> for super::Header {
    fn from(former: Template) -> Self {
        let Template { abi_version, cpu_features, machine, disk, working_set, in_place } = former;
        let machine = machine.into();
        Self { abi_version, cpu_features, machine, disk, working_set, in_place }
    }
}

impl From<Diff> for diff::Header {
    fn from(Diff { abi_version, template, machine }: Diff) -> Self {
        let (function, working_set, in_place) = Default::default();
        Self { abi_version, template, machine: machine.into(), function, working_set, in_place }
    }
}
