//! `warren.v1`: clients, servers and messages generated from `proto/warren/v1/*.proto`, where they
//! are documented; [`endpoint`]: how a server is reached; [`server`]: how one is run; [`route`]: what
//! makes a route table; [`policy`]: what makes a rule of a security group; [`limits`]: limits of an
//! instance; [`security`]: a VPC's groups and defaults; [`hook`]: commands of the
//! operator's.
#![deny(missing_docs)]

/// Package `warren.v1`.
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("warren.v1");

    /// The encoded `FileDescriptorSet`, for gRPC server reflection.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/warren.v1.bin"));
}

pub mod endpoint;
pub mod hook;
pub mod limits;
pub mod policy;
pub mod route;
pub mod security;
pub mod server;
