use proptest::prelude::*;
use warren_proto::v1::{
    FunctionAlias, FunctionVersion, HttpTrigger, TimerTrigger, WeightedVersion,
};

use super::*;

fn function(name: &str, numbers: &[u64], aliases: &[(&str, &[(u64, u32)])]) -> Function {
    let version = |number: &u64| FunctionVersion { number: *number, ..Default::default() };
    let alias = |(name, shares): &(&str, &[(u64, u32)])| FunctionAlias {
        name: (*name).to_owned(),
        versions: shares
            .iter()
            .map(|(number, weight)| WeightedVersion { number: *number, weight: *weight })
            .collect(),
        former: Vec::new(),
    };
    Function {
        name: name.to_owned(),
        vpc: "blue".to_owned(),
        versions: numbers.iter().map(version).collect(),
        aliases: aliases.iter().map(alias).collect(),
    }
}

fn http(name: &str, host: &str, prefix: &str, alias: &str) -> Trigger {
    Trigger {
        name: name.to_owned(),
        function: "f".to_owned(),
        alias: alias.to_owned(),
        kind: Some(Kind::Http(HttpTrigger {
            host: host.to_owned(),
            prefix: prefix.to_owned(),
            strip: true,
        })),
    }
}

fn routes(function: Function, triggers: &[Trigger]) -> Routes {
    Routes::new(&BTreeMap::from([(function.name.clone(), function)]), triggers)
}

#[test]
fn the_host_then_the_longest_prefix() {
    let triggers = [
        http("any", "", "", ""),
        http("any-api", "", "/api/v1", ""),
        http("site", "shop.example", "", ""),
        http("api", "Shop.Example.", "/api/", ""),
    ];
    let routes = routes(function("f", &[1], &[]), &triggers);
    let trigger = |host, path| {
        let route = routes.find(host, path).unwrap();
        (route.target.trigger.as_str(), route.strip)
    };
    assert_eq!(trigger("other.example", "/"), ("any", 0));
    assert_eq!(trigger("other.example:80", "/api/v1/x"), ("any-api", 2));
    assert_eq!(trigger("shop.example", "/apiary"), ("site", 0));
    assert_eq!(trigger("SHOP.example:8080", "/api"), ("api", 1));
    assert_eq!(trigger("shop.example.", "/%61pi/v1"), ("api", 1));
    assert_eq!(trigger("[::1]:80", "/"), ("any", 0));
    assert!(matches!(routes.find("x", "/api/%2e%2e/y"), Err(Refusal::BadPath(_))));
}

#[test]
fn aliases_are_names_numbers_or_the_last_version() {
    let shares: &[(u64, u32)] = &[(1, 3), (2, 1), (9, 5)];
    let function = function("f", &[1, 2, 3], &[("live", shares), ("none", &[])]);
    let triggers = [
        http("a", "a", "", ""),
        http("b", "b", "", "$LATEST"),
        http("c", "c", "", "2"),
        http("d", "d", "", "live"),
        http("e", "e", "", "none"),
        http("g", "g", "", "4"),
    ];
    let routes = routes(function, &triggers);
    let number = |host: &str, draw| {
        routes.find(host, "/").unwrap().target.version(draw).map(|version| version.number)
    };
    assert_eq!((number("a", 7), number("b", 8), number("c", 9)), (Ok(3), Ok(3), Ok(2)));
    // Version 9 is not there: its part is the others'.
    let drawn: Vec<_> = (0..4).map(|draw| number("d", draw).unwrap()).collect();
    assert_eq!(drawn, [1, 1, 1, 2]);
    assert_eq!(number("d", 4), Ok(1));
    for host in ["e", "g"] {
        assert!(matches!(number(host, 0), Err(Refusal::NoVersion { .. })), "{host}");
    }
}

#[test]
fn a_trigger_without_its_function_says_so_and_other_kinds_are_found_by_name() {
    let mut lost = http("lost", "", "", "");
    lost.function = "gone".to_owned();
    let kind = Some(Kind::Timer(TimerTrigger { cron: "* * * * *".to_owned() }));
    let timer = Trigger { name: "t".to_owned(), kind, ..http("t", "", "", "") };
    let routes = routes(function("f", &[1], &[]), &[lost, timer]);
    let error = routes.find("x", "/").unwrap().target.version(0).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
    assert_eq!(routes.timers().collect::<Vec<_>>(), [("t", "* * * * *")]);
    assert!(routes.timer("t").is_some() && routes.event("t").is_none());
}

/// A few hosts, and paths of few short segments, so that they often fit.
fn path() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "c d"]), 0..4)
}

fn text(segments: &[&str]) -> String {
    segments.iter().flat_map(|segment| ["/", segment]).collect()
}

proptest! {
    #[test]
    fn it_finds_what_a_naive_search_finds(
        triggers in prop::collection::vec((prop::sample::select(vec!["", "x", "y"]), path()), 0..8),
        host in prop::sample::select(vec!["x", "y", "z"]),
        asked in path(),
    ) {
        let made: Vec<_> = triggers
            .iter()
            .enumerate()
            .map(|(index, (host, prefix))| http(&format!("{index}"), host, &text(prefix), ""))
            .collect();
        let routes = routes(function("f", &[1], &[]), &made);
        let fits = triggers.iter().enumerate().filter(|(_, (of, prefix))| {
            (of.is_empty() || *of == host) && asked.starts_with(prefix)
        });
        let best = fits.max_by_key(|(index, (of, prefix))| {
            (!of.is_empty(), prefix.len(), std::cmp::Reverse(*index))
        });
        let encoded = text(&asked).replace(' ', "%20");
        let found = routes.find(host, if encoded.is_empty() { "/" } else { &encoded });
        if let Some((index, (_, prefix))) = best {
            let found = found.unwrap();
            prop_assert_eq!(&found.target.trigger, &index.to_string());
            prop_assert_eq!(found.strip, prefix.len());
        } else {
            prop_assert_eq!(found, Err(Refusal::NoRoute));
        }
    }

    #[test]
    fn no_path_breaks_it(host in ".{0,20}", path in "[/.%a-f0-9é*]{0,20}") {
        let routes = routes(function("f", &[1], &[]), &[http("any", "", "/a", "")]);
        if let Ok(route) = routes.find(&host, &path) {
            let rest = crate::path::without_first(&path, route.strip);
            prop_assert!(rest.starts_with('/'));
        }
    }
}
