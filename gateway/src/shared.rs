//! The routes in use, which calls read while they are replaced.

use std::sync::{Arc, PoisonError, RwLock};

use crate::routes::Routes;

/// A handle to the routes in use.
#[derive(Clone, Default)]
pub struct SharedRoutes(Arc<RwLock<Arc<Routes>>>);

impl SharedRoutes {
    /// The routes in use now.
    pub fn get(&self) -> Arc<Routes> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses others from now on.
    pub fn set(&self, routes: Routes) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(routes);
    }
}
