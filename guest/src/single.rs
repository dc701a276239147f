//! What libraries want to be thread-safe, in a guest that has one thread.

/// A value that may be sent to, and shared with, the other threads that there are not.
pub struct Single<T>(pub T);

// SAFETY: a guest has one thread and no interrupts.
unsafe impl<T> Send for Single<T> {}

// SAFETY: as above.
unsafe impl<T> Sync for Single<T> {}
