//! Where packages are kept: a region with two zones, and a host in one of them.

mod cache;
mod line;
mod repository;
