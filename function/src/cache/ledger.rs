//! What is in a cache, and what must go to make room: the accounts, without the files.

use std::collections::HashMap;

use crate::digest::Digest;

/// A package in the cache, or what it is to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Whose it is.
    pub tenant: String,
    /// Which it is.
    pub digest: Digest,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    used: u64,
}

/// A tenant's packages.
#[derive(Debug, Default)]
struct Tenant {
    packages: HashMap<Digest, Entry>,
    used: u64,
}

/// The accounts of a cache.
#[derive(Debug)]
pub struct Ledger {
    limit: u64,
    bytes: u64,
    /// Counts uses; what was used later has the larger one.
    clock: u64,
    tenants: HashMap<String, Tenant>,
}

impl Ledger {
    /// Accounts with nothing in them, and room for so many bytes.
    pub fn new(limit: u64) -> Self {
        Self { limit, bytes: 0, clock: 0, tenants: HashMap::new() }
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The digests of a tenant.
    pub fn of(&self, tenant: &str) -> Vec<Digest> {
        let packages = self.tenants.get(tenant).map(|tenant| tenant.packages.keys());
        packages.into_iter().flatten().copied().collect()
    }

    /// A package was used, which no longer is the first to go; nor is its tenant.
    pub fn touch(&mut self, key: &Key) {
        self.clock += 1;
        let Some(tenant) = self.tenants.get_mut(&key.tenant) else { return };
        tenant.used = self.clock;
        if let Some(entry) = tenant.packages.get_mut(&key.digest) {
            entry.used = self.clock;
        }
    }

    /// A package has come, and is used. Answers what has to go: all packages of the tenant that was
    /// used longest ago, then of the next; last those of its own tenant, but never itself.
    pub fn insert(&mut self, key: &Key, bytes: u64) -> Vec<Key> {
        self.remove(key);
        let tenant = self.tenants.entry(key.tenant.clone()).or_default();
        tenant.packages.insert(key.digest, Entry { bytes, used: 0 });
        self.bytes += bytes;
        self.touch(key);
        let mut gone = Vec::new();
        while self.bytes > self.limit {
            let Some(first) = self.first_to_go(key) else { break };
            for key in &first {
                self.remove(key);
            }
            gone.extend(first);
        }
        gone
    }

    /// A package is gone.
    pub fn remove(&mut self, key: &Key) {
        let Some(tenant) = self.tenants.get_mut(&key.tenant) else { return };
        if let Some(entry) = tenant.packages.remove(&key.digest) {
            self.bytes -= entry.bytes;
        }
        if tenant.packages.is_empty() {
            self.tenants.remove(&key.tenant);
        }
    }

    fn first_to_go(&self, staying: &Key) -> Option<Vec<Key>> {
        let key =
            |tenant: &str, digest: &Digest| Key { tenant: tenant.to_owned(), digest: *digest };
        let others = self.tenants.iter().filter(|(name, _)| **name != staying.tenant);
        if let Some((name, tenant)) = others.min_by_key(|(_, tenant)| tenant.used) {
            return Some(tenant.packages.keys().map(|digest| key(name, digest)).collect());
        }
        let own = self.tenants.get(&staying.tenant)?.packages.iter();
        let own = own.filter(|(digest, _)| **digest != staying.digest);
        let (digest, _) = own.min_by_key(|(_, entry)| entry.used)?;
        Some(vec![key(&staying.tenant, digest)])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: u64 = 100;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Key, u64),
        Touch(Key),
        Remove(Key),
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = (0..4_u8, 0..5_u8).prop_map(|(tenant, number)| Key {
            tenant: format!("t{tenant}"),
            digest: Digest::of(&[number]),
        });
        prop_oneof![
            4 => (key.clone(), 1..=LIMIT / 2).prop_map(|(key, bytes)| Step::Insert(key, bytes)),
            4 => key.clone().prop_map(Step::Touch),
            1 => key.prop_map(Step::Remove),
        ]
    }

    /// The same in plain words: what is there, and all uses, the last one last.
    #[derive(Default)]
    struct Model {
        there: Vec<(Key, u64)>,
        uses: Vec<Key>,
    }

    impl Model {
        fn bytes(&self) -> u64 {
            self.there.iter().map(|(_, bytes)| bytes).sum()
        }

        fn last(&self, is: impl Fn(&Key) -> bool) -> Option<usize> {
            self.uses.iter().rposition(is)
        }

        /// The key that goes first, if its tenant goes or if this is its tenant.
        fn first_to_go(&self, staying: &Key) -> Option<Key> {
            let keys = self.there.iter().map(|(key, _)| key).filter(|key| *key != staying);
            let order = |key: &&Key| {
                let own = key.tenant == staying.tenant;
                let tenant = self.last(|used| used.tenant == key.tenant);
                (own, tenant, self.last(|used| used == *key))
            };
            keys.min_by_key(order).cloned()
        }

        fn insert(&mut self, key: &Key, bytes: u64) -> Vec<Key> {
            self.there.retain(|(there, _)| there != key);
            self.there.push((key.clone(), bytes));
            self.uses.push(key.clone());
            let mut gone = Vec::new();
            while self.bytes() > LIMIT {
                let Some(first) = self.first_to_go(key) else { break };
                let goes = |there: &Key| {
                    *there == first || first.tenant != key.tenant && there.tenant == first.tenant
                };
                gone.extend(self.there.iter().map(|(key, _)| key.clone()).filter(goes));
                self.there.retain(|(there, _)| !goes(there));
            }
            gone
        }
    }

    proptest! {
        #[test]
        fn it_evicts_as_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
            let (mut ledger, mut model) = (Ledger::new(LIMIT), Model::default());
            for step in steps {
                match step {
                    Step::Insert(key, bytes) => {
                        let mut gone = ledger.insert(&key, bytes);
                        let mut expected = model.insert(&key, bytes);
                        gone.sort();
                        expected.sort();
                        prop_assert_eq!(gone, expected);
                        prop_assert!(ledger.of(&key.tenant).contains(&key.digest));
                    }
                    Step::Touch(key) => {
                        ledger.touch(&key);
                        model.uses.push(key);
                    }
                    Step::Remove(key) => {
                        ledger.remove(&key);
                        model.there.retain(|(there, _)| *there != key);
                    }
                }
                prop_assert_eq!(ledger.bytes(), model.bytes());
                prop_assert!(ledger.bytes() <= LIMIT);
            }
        }
    }
}
