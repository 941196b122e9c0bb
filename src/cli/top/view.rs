//! Draws the screen of `plyfs top`.
//!
//! What must hold: a frame of a thousand disks costs as much to draw as one of the disks that fit the screen.

use std::time::SystemTime;

use ratatui::Frame as Screen;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;
use serde_json::Value;
use unicode_width::UnicodeWidthStr;

use super::app::{App, Tab};
use super::sample::Frame;
use crate::cli::output::{Column, Kind, printable};
use crate::cli::table::{cell, cut, widths};

const HELP: [&str; 12] = [
    "q, Esc          quit; Esc removes a filter first",
    "p, Space        pause, and go on",
    "Tab             disks, bases, servers",
    "< >             column to sort by",
    "r               turn the order",
    "/               filter: part of a name, COLUMN=VALUE or COLUMN~TEXT; Enter takes it, Esc does not",
    "+ -             longer or shorter interval",
    "Up Down j k     one row",
    "PgUp PgDn       one page",
    "Home End g G    first and last row",
    "? h             these keys",
    "HIT%            share of the bytes read from bases that a cache had",
];

/// The lines above the tables.
pub(super) fn summary(frame: &Frame) -> Vec<String> {
    let now = SystemTime::now();
    let of = |key: &str, kind| cell(&frame.total, key, kind, now);
    let worker = if frame.worker_changed { ", another worker than before" } else { "" };
    let waiting = frame.servers.iter().filter(|server| !server["trouble"].is_null()).count();
    vec![
        format!("plyfs top  {}  {} s  worker {}{worker}", frame.at, frame.seconds, frame.worker),
        format!(
            "disks: {}, bases: {}, servers: {} ({waiting} with trouble)  delta {}, {}/s",
            frame.disks.len(),
            frame.bases.len(),
            frame.servers.len(),
            of("delta_bytes", Kind::Size),
            of("delta_growth_per_second", Kind::Size),
        ),
        format!(
            "{} op/s  read {}/s in {}/s, {}  written {}/s in {}/s, {}  hit {} %  {} waits/s  {} errors/s",
            of("operations_per_second", Kind::Number),
            of("read_bytes_per_second", Kind::Size),
            of("reads_per_second", Kind::Number),
            of("read_latency_us", Kind::Micros),
            of("write_bytes_per_second", Kind::Size),
            of("writes_per_second", Kind::Number),
            of("write_latency_us", Kind::Micros),
            of("hit_percent", Kind::Number),
            of("waits_per_second", Kind::Number),
            of("errors_per_second", Kind::Number),
        ),
    ]
}

/// Draws the whole screen.
pub(super) fn draw(screen: &mut Screen<'_>, app: &mut App) {
    let rows = [Constraint::Length(3), Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)];
    let [head, tabs, body, foot] = Layout::vertical(rows).areas(screen.area());
    app.set_height(usize::from(body.height).saturating_sub(1));
    let lines = if app.has_frame {
        summary(app.frame())
    } else {
        vec![format!("plyfs top  the first numbers come in {} s", app.interval())]
    };
    let lines: Vec<Line<'_>> = lines.iter().map(|line| Line::from(fit(line, head))).collect();
    screen.render_widget(Paragraph::new(lines), head);
    screen.render_widget(Paragraph::new(tab_line(app)), tabs);
    if app.shows_help {
        let lines: Vec<Line<'_>> = HELP.iter().map(|line| Line::from(fit(line, body))).collect();
        screen.render_widget(Paragraph::new(lines), body);
    } else {
        screen.render_widget(Paragraph::new(table_lines(app, body)), body);
    }
    screen.render_widget(Paragraph::new(foot_line(app, foot)), foot);
}

fn fit(text: &str, area: Rect) -> String {
    cut(text, area.width.into())
}

fn tab_line(app: &App) -> Line<'static> {
    let reversed = Style::new().add_modifier(Modifier::REVERSED);
    let mut spans = Vec::new();
    for tab in Tab::ALL {
        let style = if tab == app.tab() { reversed } else { Style::new() };
        spans.push(Span::styled(format!(" {} ", tab.title()), style));
        spans.push(Span::raw(" "));
    }
    let (rows, first) = app.rows();
    let (shown, all) = (rows.len().saturating_sub(first).min(app.height), app.all().len());
    let range = if rows.is_empty() { "0".to_owned() } else { format!("{}-{}", first + 1, first + shown) };
    let of_all = if rows.len() == all { String::new() } else { format!(" (of {all})") };
    spans.push(Span::raw(format!("{range} of {}{of_all}", rows.len())));
    if app.is_paused {
        spans.push(Span::styled("  PAUSED", reversed));
    }
    Line::from(spans)
}

fn table_lines(app: &App, area: Rect) -> Vec<Line<'static>> {
    let columns = app.tab().noun().columns;
    let (rows, first) = app.rows();
    let end = rows.len().min(first + app.height);
    let now = SystemTime::now();
    let text = |row: &Value| columns.iter().map(|&(_, key, kind)| cell(row, key, kind, now)).collect();
    let titles: Vec<String> = columns.iter().map(|(title, ..)| (*title).to_owned()).collect();
    let shown: Vec<Vec<String>> =
        std::iter::once(titles).chain(rows[first.min(end)..end].iter().map(text)).collect();
    let widths = widths(&shown, columns, Some(area.width.into()));
    let sorted_by = app.order().map(|((_, key, _), _)| key);
    let line = |(number, cells): (usize, &Vec<String>)| {
        let mut spans = Vec::new();
        let mut left = usize::from(area.width);
        for ((value, &width), column) in cells.iter().zip(&widths).zip(columns) {
            let text = cut(&aligned(value, width, column), left);
            left = left.saturating_sub(text.width());
            spans.push(Span::styled(text, style(number, value, column, sorted_by)));
        }
        Line::from(spans)
    };
    shown.iter().enumerate().map(line).collect()
}

fn aligned(value: &str, width: usize, (_, _, kind): &Column) -> String {
    let value = cut(value, width);
    let padding = " ".repeat(width - value.width());
    if kind.is_numeric() { format!("{padding}{value}  ") } else { format!("{value}{padding}  ") }
}

fn style(number: usize, value: &str, (_, key, kind): &Column, sorted_by: Option<&str>) -> Style {
    match number {
        0 if sorted_by == Some(*key) => Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED),
        0 => Style::new().add_modifier(Modifier::BOLD),
        _ if *key == "state" && value != "ok" => Style::new().fg(Color::Yellow),
        _ if *key == "trouble" && value != "-" => Style::new().fg(Color::Yellow),
        _ if *key == "errors_per_second" && value != "-" && value != "0.0" => Style::new().fg(Color::Red),
        _ if kind.is_numeric() && matches!(value, "0" | "0.0" | "-") => Style::new().fg(Color::DarkGray),
        _ => Style::new(),
    }
}

fn foot_line(app: &App, area: Rect) -> Line<'static> {
    if let Some(typed) = &app.typed {
        return Line::from(fit(&format!("filter: {}_", printable(typed)), area));
    }
    if let Some(error) = &app.error {
        return Line::styled(fit(&printable(error), area), Style::new().fg(Color::Red));
    }
    let filters = app.filters();
    let filter = if filters.is_empty() { String::new() } else { format!("  filter: {}", filters.join(" ")) };
    let text = format!(
        "q quit  p pause  Tab table  < > r sort  / filter  ? keys  every {} s{filter}",
        app.interval()
    );
    Line::from(fit(&printable(&text), area))
}
