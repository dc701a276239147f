//! Results as text: tables for people, JSON for programs.

mod capture;
mod drops;
mod flows;
mod functions;
mod probe;
mod routes;
mod rows;
mod security;
mod snapshots;
mod templates;

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::args::Output;

pub use capture::CaptureRow;
pub use drops::{DropRow, Scope, drop_rows};
pub use flows::{FlowRow, MappingRow};
pub use functions::{
    AliasRow, DeletedRow, DeployedRow, FileRow, FunctionRow, TriggerRow, VersionRow, alias_rows,
    version_rows,
};
pub use probe::probe;
pub use routes::{RouteRow, route_rows};
pub use rows::{ForgottenRow, HostRow, StoppedRow, VpcRow, instance_rows, started_rows};
pub use security::{DeletedGroupRow, GuardRow, group_rows, rule_rows};
pub use snapshots::{RemovedSnapshotRow, SnapshotRow};
pub use templates::template_rows;

/// Something that is a row of a table and an object in JSON.
pub trait Row: Serialize {
    /// Its table's header.
    const HEADER: &'static [&'static str];
    /// Its cells, as many as the header has.
    fn cells(&self) -> Vec<String>;
}

/// Several rows. In JSON an array, even of one.
pub fn list<R: Row>(output: Output, rows: &[R]) -> String {
    match output {
        Output::Json => pretty(rows),
        Output::Table => table(R::HEADER, rows.iter().map(Row::cells)),
    }
}

/// One row. In JSON an object.
pub fn one<R: Row>(output: Output, row: &R) -> String {
    match output {
        Output::Json => pretty(row),
        Output::Table => table(R::HEADER, [row.cells()]),
    }
}

/// Rows that are followed by others later on. In JSON a line each.
pub fn chunk<R: Row>(output: Output, rows: &[R]) -> String {
    match output {
        // For the same reason as in `pretty`, none is left out.
        Output::Json => {
            let lines: Vec<_> =
                rows.iter().filter_map(|row| serde_json::to_string(row).ok()).collect();
            lines.join("\n")
        }
        Output::Table => list(output, rows),
    }
}

fn pretty<T: Serialize + ?Sized>(value: &T) -> String {
    // Only maps with keys that are no texts, or a failing Serialize, can fail: there are none.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines: Vec<_> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// Nanoseconds as microseconds, to a tenth.
fn us(nanoseconds: u64) -> String {
    format!("{:.1} µs", nanoseconds as f64 / 1000.0)
}

fn dash(text: Option<&str>) -> String {
    text.unwrap_or("-").to_owned()
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}
