//! The rows of templates.

use serde::Serialize;
use warren_proto::v1;

use super::Row;

/// A template of a host, and its pool.
#[derive(Serialize)]
pub struct TemplateRow {
    host: String,
    template: String,
    /// It is what microVMs on this host are of that name none.
    default: bool,
    parked: u32,
    /// How many are to be parked now.
    wanted: u32,
}

/// The templates of these hosts, in the hosts' own order.
pub fn template_rows(hosts: Vec<v1::Host>) -> Vec<TemplateRow> {
    let rows = hosts.into_iter().flat_map(|host| {
        let name = host.name;
        host.templates.into_iter().enumerate().map(move |(index, pool)| TemplateRow {
            host: name.clone(),
            template: pool.template,
            default: index == 0,
            parked: pool.parked,
            wanted: pool.parked_target,
        })
    });
    rows.collect()
}

impl Row for TemplateRow {
    const HEADER: &'static [&'static str] = &["HOST", "TEMPLATE", "DEFAULT", "PARKED", "WANTED"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.host.clone(),
            self.template.clone(),
            if self.default { "yes" } else { "no" }.to_owned(),
            self.parked.to_string(),
            self.wanted.to_string(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Output;
    use crate::render::list;

    #[test]
    fn templates_are_told_by_host() {
        let pool = |template: &str, parked, parked_target| v1::TemplatePool {
            template: template.into(),
            parked,
            parked_target,
        };
        let host = |name: &str, templates| v1::Host {
            name: name.into(),
            templates,
            ..v1::Host::default()
        };
        let hosts = vec![
            host("h1", vec![pool("small", 8, 12), pool("large", 2, 2)]),
            host("h2", vec![pool("large", 4, 4)]),
            host("p1", vec![]),
        ];
        let rows = template_rows(hosts);
        assert_eq!(
            list(Output::Table, &rows),
            "HOST  TEMPLATE  DEFAULT  PARKED  WANTED\n\
             h1    small     yes      8       12\n\
             h1    large     no       2       2\n\
             h2    large     yes      4       4"
        );
        let json: serde_json::Value = serde_json::from_str(&list(Output::Json, &rows)).unwrap();
        assert_eq!((&json[0]["wanted"], &json[1]["default"]), (&12.into(), &false.into()));
    }
}
