//! x
#![deny(missing_docs)]
pub mod instances;
pub mod path;
pub mod refusal;
pub mod routes;
