//! Of a component to its package.

mod check;
mod compile;
mod component;
