//! What microVMs were made from, and how.

use std::fmt;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;

use serde::{Deserialize, Serialize};

use crate::jail::JailConfig;
use crate::rates::Rates;

/// Tells whether one microVM can stand in for another before they are released: of the same template
/// or diff, in the same jail, with the same rates, and `warren-vmm` of the same version. It shows in no
/// other way what it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Make([u8; 32]);

impl Make {
    /// Of the file with this checksum, in this jail, with these rates, by this program.
    pub fn new(origin: &[u8; 32], jail: &JailConfig, rates: &Rates) -> Self {
        let JailConfig { first_uid, cgroup, cpu_percent } = jail;
        let mut hasher = blake3::Hasher::new_derive_key("warren microVM's make");
        hasher.update(origin);
        hasher.update(&first_uid.to_le_bytes());
        hasher.update(&cpu_percent.to_le_bytes());
        for (_, rate) in rates.options() {
            hasher.update(&rate.map_or(0, NonZeroU64::get).to_le_bytes());
        }
        for text in [env!("CARGO_PKG_VERSION").as_bytes(), cgroup.as_os_str().as_bytes()] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

impl fmt::Display for Make {
    /// Its first 8 bytes, which is enough for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_differs_is_of_another_make() {
        let (jail, rates) = (JailConfig::named("a"), Rates::default());
        let make = Make::new(&[1; 32], &jail, &rates);
        assert_eq!(Make::new(&[1; 32], &jail, &rates), make);
        assert_ne!(Make::new(&[2; 32], &jail, &rates), make);
        for other in [
            JailConfig { first_uid: 1, ..jail.clone() },
            JailConfig { cpu_percent: 50, ..jail.clone() },
            JailConfig::named("b"),
        ] {
            assert_ne!(Make::new(&[1; 32], &other, &rates), make, "{other:?}");
        }
        let rate = NonZeroU64::new(1000);
        let (bytes, frames) = (
            Rates { net_receive_bytes: rate, ..rates },
            Rates { net_receive_frames: rate, ..rates },
        );
        let makes = [bytes, frames].map(|rates| Make::new(&[1; 32], &jail, &rates));
        assert!(makes[0] != make && makes[1] != make && makes[0] != makes[1]);
    }
}
