//! Debian's `PostgreSQL` and its benchmark.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::{User, chown};

use crate::netns::Namespace;
use crate::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 5432;
/// The only user that `PostgreSQL` runs as; also that of the database.
const USER: &str = "postgres";

/// Starts `PostgreSQL` on all addresses of the namespace, with `pgbench`'s tables in it. Nothing is
/// kept on the disk for longer than it has to.
pub fn start(namespace: &Namespace, dir: &Path) -> Result<Process> {
    let user = User::from_name(USER)?.context("no user postgres (package postgresql)")?;
    let data = dir.join("postgres");
    std::fs::create_dir_all(&data)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    chown(&data, Some(user.uid), Some(user.gid))?;
    let mut initdb = run_as_user(Command::new("setpriv"), program("initdb")?);
    initdb.current_dir(&data);
    initdb.args(["--auth=trust", "--no-sync", "--username", USER, "--pgdata"]).arg(&data);
    finish(&mut initdb)?;
    let access = data.join("pg_hba.conf");
    std::fs::write(&access, "host all all 0.0.0.0/0 trust\n")?;

    let mut command = run_as_user(namespace.command("setpriv"), program("postgres")?);
    command.current_dir(&data);
    command.arg("-D").arg(&data).args(["-p", &PORT.to_string()]);
    for setting in ["listen_addresses=*", "unix_socket_directories=", "fsync=off"] {
        command.args(["-c", setting]);
    }
    let mut process = Process::start("postgres", command, &dir.join("postgres.log"))?;
    let ready = program("pg_isready")?;
    process.wait_until(PATIENCE, || {
        let mut ask = namespace.command(&ready);
        ask.args(["--quiet", "-h", "127.0.0.1", "-p", &PORT.to_string()]);
        ask.status().is_ok_and(|status| status.success())
    })?;
    let mut tables = pgbench(namespace, Ipv4Addr::LOCALHOST)?;
    finish(tables.args(["--initialize", "--quiet"]).arg(USER))?;
    Ok(process)
}

/// `pgbench` in a namespace, against the server at this address; the database is to be added.
pub fn pgbench(namespace: &Namespace, server: Ipv4Addr) -> Result<Command> {
    let mut command = namespace.command(program("pgbench")?);
    command.args(["-h", &server.to_string(), "-p", &PORT.to_string(), "-U", USER]);
    Ok(command)
}

/// Only root enters a namespace, and `PostgreSQL` is not run by root: `setpriv` is in between. It
/// tells the kernel again to kill the server with its starter, which a change of user undoes.
fn run_as_user(mut setpriv: Command, program: PathBuf) -> Command {
    setpriv.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--pdeathsig", "KILL"]);
    setpriv.arg(program);
    setpriv
}

/// Debian keeps the programs of each version in a directory of its own.
fn program(name: &str) -> Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(name)).find(|p| p.exists());
    found.with_context(|| format!("no {name} (package postgresql)"))
}

fn finish(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {error}", command.get_program().display());
    Ok(())
}
