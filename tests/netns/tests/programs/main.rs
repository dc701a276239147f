//! The programs, run on frames by the kernel (`BPF_PROG_TEST_RUN`): no interface, no pin, no
//! traffic. What they do with whatever a guest, a VPC or a tunnel may send.

mod budget;
mod fragments;
mod frames;
mod host;
mod proxy;
mod run;
mod v6;
