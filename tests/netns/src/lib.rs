#![deny(missing_docs)]
