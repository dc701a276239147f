//! What a function is, for those who publish it and for the guest that runs it.
//!
//! | module | what |
//! |---|---|
//! | [`package`] | the one file that a function is |
//! | `engine` | set-up that compiler and guest have in common |
//! | `check` | whether a component is one that the guest can run |
//! | `compile`, `compiled` | the compiler, and a component's code, compiled ahead of time |
//! | `options` | what the tenant wants of a function, which with its code makes the package |
//! | `jail`, `jailed` | the walls around the compiler, which meets hostile input, and who asks it |
//! | `digest` | what a package is called |
//! | `repository` | where packages are kept: a region, and each of its zones |
//! | `cache` | packages of a host's tenants, on the host |
//! | `blocking` | work that takes its time |
#![cfg_attr(not(any(feature = "publish", feature = "store")), no_std)]
#![deny(missing_docs)]

extern crate alloc;

#[cfg(feature = "store")]
pub mod blocking;
#[cfg(feature = "store")]
pub mod cache;
#[cfg(feature = "publish")]
pub mod check;
#[cfg(feature = "compile")]
pub mod compile;
#[cfg(feature = "publish")]
pub mod compiled;
#[cfg(any(feature = "publish", feature = "store"))]
pub mod digest;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "compile")]
pub mod jail;
#[cfg(feature = "publish")]
pub mod jailed;
#[cfg(feature = "publish")]
pub mod options;
pub mod package;
#[cfg(feature = "store")]
pub mod repository;
