//! A gateway and relays as they are run, with guests, agents and a control plane that are tasks.

mod agent;
mod calls;
mod control;
mod events;
mod guest;
mod relay;
mod restarts;
mod world;
