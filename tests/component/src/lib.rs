//! Does what a test asks for: the path says what, and what follows `?` says with what.

mod answer;
mod endings;
mod files;
mod network;

use std::fmt::Write as _;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use wasip2::cli::environment::{get_arguments, get_environment};
use wasip2::cli::{stderr, stdout};
use wasip2::clocks::{monotonic_clock, wall_clock};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, Method, ResponseOutparam, Scheme};
use wasip2::random::random::get_random_bytes;

use answer::text;

struct Tested;

wasip2::http::proxy::export!(Tested);

/// How often it was called, and how often initialised.
static CALLS: AtomicU32 = AtomicU32::new(0);
static INITIALISED: AtomicU32 = AtomicU32::new(0);

/// Part of its instantiation: does what the variable `INITIALISE` says.
#[unsafe(no_mangle)]
extern "C" fn _initialize() {
    INITIALISED.fetch_add(1, Ordering::Relaxed);
    match variable("INITIALISE").as_deref() {
        Some("random") => drop(get_random_bytes(8)),
        Some("monotonic-clock") => drop(monotonic_clock::now()),
        Some("wall-clock") => drop(wall_clock::now()),
        Some("wait") => monotonic_clock::subscribe_duration(1).block(),
        Some("lookup") => drop(network::lookup("db.local")),
        Some("log") => say("it initialises itself"),
        Some("trap") => endings::trap(),
        _ => {}
    }
}

fn variable(name: &str) -> Option<String> {
    get_environment().into_iter().find_map(|(known, value)| (known == name).then_some(value))
}

fn say(line: &str) {
    let line = format!("{line}\n");
    stdout::get_stdout().blocking_write_and_flush(line.as_bytes()).unwrap();
}

impl Guest for Tested {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        let (path, with) = target.split_once('?').unwrap_or((&target, ""));
        match path {
            "/echo" => answer::echo(&request, out),
            "/echo-body-first" => answer::echo_whole(&request, out),
            "/zeroes" => answer::zeroes(out, with.parse().unwrap()),
            "/slowly" => answer::slowly(out, with.parse().unwrap()),
            "/ignore" => text(out, 200, "ignored"),
            "/status" => text(out, with.parse().unwrap(), "status"),
            "/fields" => answer::fields(&request, out),
            "/length" => answer::with_length(out, with),
            "/trailers" => answer::trailers(&request, out),
            "/unfinished" => answer::unfinished(out),
            "/on" => answer::answer_and_go_on(out, with),
            "/error" => answer::error(out),
            "/no-answer" => {}
            "/endings" => endings::end(out, with),
            other => match said(&request, other, with) {
                Ok(said) => text(out, 200, &said),
                Err(reason) => text(out, 500, &reason),
            },
        }
    }
}

/// What is answered in a few words.
fn said(request: &IncomingRequest, path: &str, with: &str) -> Result<String, String> {
    Ok(match path {
        "/calls" => {
            let calls = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
            format!("{calls} {}", INITIALISED.load(Ordering::Relaxed))
        }
        "/request" => {
            let method = match request.method() {
                Method::Other(name) => format!("other {name}"),
                Method::Get => "get".into(),
                Method::Delete => "delete".into(),
                _ => "another".into(),
            };
            let authority = request.authority().unwrap_or_default();
            let is_https = matches!(request.scheme(), Some(Scheme::Https));
            format!("{method} {is_https} {authority} {with}")
        }
        "/environment" => {
            let mut said = get_arguments().join(" ");
            for (name, value) in get_environment() {
                writeln!(said, "{name}={value}").unwrap();
            }
            said
        }
        "/random" => {
            let bytes = get_random_bytes(with.parse().unwrap());
            bytes.iter().fold(String::new(), |said, byte| said + &format!("{byte:02x}"))
        }
        "/clocks" => {
            let before = monotonic_clock::now();
            monotonic_clock::subscribe_duration(with.parse::<u64>().unwrap() * 1_000_000).block();
            let after = monotonic_clock::now();
            format!("{} {}", wall_clock::now().seconds, after - before)
        }
        "/log" => {
            say(&format!("out {with}"));
            let mut stream = stderr::get_stderr();
            stream.write_all(format!("err {with}\nno end of line").as_bytes()).unwrap();
            "logged".into()
        }
        "/resources" => answer::hold_many(with.parse().unwrap()),
        _ if path.starts_with("/files") => files::perform(&path[6..], with)?,
        _ if path.starts_with("/network") => network::perform(&path[8..], with)?,
        _ => return Err(format!("{path} is nothing that this can do")),
    })
}
