//! `warrend`, the daemon of hosts and proxy nodes.
//!
//! [`datapath`] is what the kernel runs: programs, maps, slots, the tunnel device. [`host`] and
//! [`proxy`] are the two roles over it; [`agent`] serves them by gRPC, [`heartbeat`] tells the
//! control plane of them, [`logs`] what functions write, [`recovery`] is what it finds when it starts, [`services`] is what guests reach beside their VPC, [`metrics`] tells Prometheus, [`trace`] subscribers of spans,
//! [`flowlog`] writes down who talked to whom, [`capture`] shows what a slot sends and receives,
//! [`config`] is what an operator writes.
#![deny(missing_docs)]

pub mod agent;
pub mod announce;
pub mod boot;
pub mod capture;
pub mod clock;
pub mod config;
pub mod datapath;
pub mod eni;
pub mod flowlog;
pub mod fragments;
pub mod heartbeat;
pub mod host;
pub mod logs;
pub mod metrics;
pub mod pool;
pub mod pools;
pub mod proxy;
pub mod recovery;
pub mod refill;
pub mod services;
pub mod slots;
pub mod trace;
