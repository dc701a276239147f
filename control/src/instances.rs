//! The instances of one host: what its heartbeats report, and what was started or stopped since.

use std::collections::BTreeMap;

use warren_proto::v1;

/// The heartbeat that comes next may have been put together before a start or a stop; the one
/// after it was not.
const HEARTBEATS_IN_DOUBT: u8 = 2;

/// The instances of one host, by id.
#[derive(Debug, Default)]
pub struct Instances {
    known: BTreeMap<String, Known>,
    /// Stopped ones, and how many heartbeats may still report them.
    stopped: BTreeMap<String, u8>,
}

#[derive(Debug)]
struct Known {
    instance: v1::Instance,
    /// How many heartbeats may still lack it.
    in_doubt: u8,
}

impl Instances {
    /// A heartbeat reports all instances of the host.
    pub fn report(&mut self, reported: Vec<v1::Instance>) {
        let mut before = std::mem::take(&mut self.known);
        for instance in reported {
            before.remove(&instance.id);
            if !self.stopped.contains_key(&instance.id) {
                self.known.insert(instance.id.clone(), Known { instance, in_doubt: 0 });
            }
        }
        for (id, known) in before {
            if known.in_doubt > 1 {
                self.known.insert(id, Known { in_doubt: known.in_doubt - 1, ..known });
            }
        }
        self.stopped.retain(|_, in_doubt| {
            *in_doubt -= 1;
            *in_doubt > 0
        });
    }

    /// The host says that it started one.
    pub fn started(&mut self, instance: v1::Instance) {
        let known = Known { instance, in_doubt: HEARTBEATS_IN_DOUBT };
        self.known.insert(known.instance.id.clone(), known);
    }

    /// The host says that it ended one.
    pub fn stopped(&mut self, id: &str) {
        self.known.remove(id);
        self.stopped.insert(id.to_owned(), HEARTBEATS_IN_DOUBT);
    }

    /// Whether an instance is on this host.
    pub fn contains(&self, id: &str) -> bool {
        self.known.contains_key(id)
    }

    /// All of them, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &v1::Instance> {
        self.known.values().map(|known| &known.instance)
    }

    /// How many hold a slot: one that ended by itself does not.
    pub fn running(&self) -> u32 {
        self.iter().filter(|instance| instance.state() == v1::InstanceState::Running).count() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str) -> v1::Instance {
        let state = v1::InstanceState::Running.into();
        v1::Instance { id: id.into(), state, ..v1::Instance::default() }
    }

    fn ids(instances: &Instances) -> Vec<&str> {
        instances.iter().map(|instance| instance.id.as_str()).collect()
    }

    #[test]
    fn a_heartbeat_replaces_the_one_before() {
        let mut instances = Instances::default();
        instances.report(vec![instance("a"), instance("b")]);
        let failed = v1::Instance { state: v1::InstanceState::Failed.into(), ..instance("c") };
        instances.report(vec![instance("b"), failed]);
        assert_eq!(ids(&instances), ["b", "c"]);
        assert_eq!(instances.running(), 1);
    }

    #[test]
    fn a_started_one_outlives_one_heartbeat_that_lacks_it() {
        let mut instances = Instances::default();
        instances.started(instance("a"));
        instances.report(vec![]);
        assert_eq!(ids(&instances), ["a"]);
        instances.report(vec![]);
        assert!(!instances.contains("a"));

        instances.started(instance("b"));
        instances.report(vec![instance("b")]);
        instances.report(vec![]);
        assert!(!instances.contains("b"), "once reported, it is the heartbeats' to tell");
    }

    #[test]
    fn a_stopped_one_does_not_come_back_with_a_late_heartbeat() {
        let mut instances = Instances::default();
        instances.report(vec![instance("a")]);
        instances.stopped("a");
        assert!(!instances.contains("a"));
        instances.report(vec![instance("a")]);
        assert!(!instances.contains("a"));
        instances.report(vec![]);
        instances.report(vec![instance("a")]);
        assert!(instances.contains("a"), "the host insists");
    }
}
