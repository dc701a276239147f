//! Short grace periods of the kernel's RCU, for as long as programs are attached.
//!
//! Attaching a program waits for a grace period: 7 ms, or 30 µs with `/sys/kernel/rcu_expedited`
//! on. It must not stay on, whatever happens: so a shell switches it on, waits until this process
//! lets go of its pipe, or is gone, and switches it off.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// The kernel takes any number but 0 for on. 2 says that it was one of these shells: a setting of
/// the administrator's, 1, is left alone. Each holds a shared lock while it needs the setting; who
/// goes waits until no one else does, so that the last one switches it off.
const GUARDIAN: &str = r#"
trap '' HUP INT TERM
setting=/sys/kernel/rcu_expedited
exec 3<$setting && flock -s 3 || exit
case $(cat $setting) in
    0 | 2) echo 2 >$setting || exit ;;
    *) exit ;;
esac
echo on
cat >/dev/null
exec 1>&-
flock -x 3
[ "$(cat $setting)" != 2 ] || echo 0 >$setting
"#;

/// Makes the kernel's grace periods short for as long as it lives.
pub(super) struct ExpeditedRcu {
    guardian: Option<Child>,
}

impl ExpeditedRcu {
    /// Switches it on. Where that is not permitted, all is slower, and no harm done.
    pub fn new() -> Self {
        // A group of its own: what a terminal sends to this process does not end the shell.
        let guardian = Command::new("sh")
            .args(["-c", GUARDIAN])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        let mut guardian = guardian.ok();
        if let Some(answer) = guardian.as_mut().and_then(|guardian| guardian.stdout.take()) {
            // On, or over: either way, there is nothing more to wait for.
            let _ = BufReader::new(answer).read_line(&mut String::new());
        }
        Self { guardian }
    }
}

impl Drop for ExpeditedRcu {
    fn drop(&mut self) {
        let Some(mut guardian) = self.guardian.take() else { return };
        drop(guardian.stdin.take());
        // It may have to wait for others to finish; nobody needs to wait for it.
        let reap = move || guardian.wait().map(drop);
        let _ = std::thread::Builder::new().name("rcu-guardian".to_owned()).spawn(reap);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const SETTING: &str = "/sys/kernel/rcu_expedited";

    fn eventually(value: &str) {
        let deadline = Instant::now() + Duration::from_mins(1);
        while std::fs::read_to_string(SETTING).is_ok_and(|found| found.trim() != value) {
            assert!(Instant::now() < deadline, "it does not become {value}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_last_one_switches_it_off() {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new(SETTING).exists() {
            return;
        }
        let (first, second) = (ExpeditedRcu::new(), ExpeditedRcu::new());
        eventually("2");
        drop(first);
        // Long enough for a shell that does not wait for the other.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(std::fs::read_to_string(SETTING).expect("it was there").trim(), "2");
        drop(second);
        eventually("0");
    }
}
