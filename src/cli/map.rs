//! `plyfs disk map` and `plyfs base map`: where the bytes are, as blocks of characters.
//!
//! A terminal gets blocks and colours. Without a terminal, or with NO_COLOR, the map is plain ASCII.

use std::fmt::Write as _;
use std::io::IsTerminal;

use serde_json::Value;

use super::Global;
use super::error::CliError;
use super::output::printable;
use crate::config::size::format_size;

/// Characters of a line of the map where there is no terminal.
const PLAIN_WIDTH: usize = 64;
/// Lines of a map.
const LINES: usize = 12;
/// Characters before the map: the offset of the line.
const MARGIN: usize = 9;
/// The most cells that a request may ask for.
const MOST_CELLS: usize = 4096;

/// One kind of bytes: its key in the answer, its name, and how cells that have it are drawn.
struct Place {
    key: &'static str,
    name: &'static str,
    /// In ASCII: a cell that mostly has it, and one that has some.
    letters: [char; 2],
    /// On a terminal: the same, and the colour (SGR).
    blocks: [char; 2],
    colour: &'static str,
}

/// In the order in which a cell is drawn: the first that it has enough of.
const PLACES: [Place; 7] = [
    Place {
        key: "fetching", name: "being fetched", letters: ['F', 'f'], blocks: ['█', '▓'], colour: "36"
    },
    Place { key: "delta", name: "delta", letters: ['D', 'd'], blocks: ['█', '▒'], colour: "33" },
    Place { key: "cached", name: "cached", letters: ['C', 'c'], blocks: ['█', '▒'], colour: "32" },
    Place { key: "local", name: "local file", letters: ['L', 'l'], blocks: ['▒', '▒'], colour: "34" },
    Place { key: "absent", name: "on the server", letters: ['-', '-'], blocks: ['░', '░'], colour: "90" },
    Place { key: "unknown", name: "unknown", letters: ['?', '?'], blocks: ['?', '?'], colour: "35" },
    Place { key: "zero", name: "zeros", letters: ['.', '.'], blocks: ['·', '·'], colour: "90" },
];
/// Of these a cell shows that it has some, even when it has more of others.
const SHOWN_IN_PART: usize = 3;

/// What the map says of a base beside the places: key and name.
const OVERLAYS: [(&str, &str); 3] = [
    ("read", "read by the recorded boot"),
    ("prefetched", "prefetched at a boot"),
    ("memory", "in the memory cache"),
];

/// How a map is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Style {
    Plain,
    Coloured,
}

/// The style and the width of standard output.
fn of_stdout() -> (Style, usize) {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if !std::io::stdout().is_terminal() {
        return (Style::Plain, PLAIN_WIDTH);
    }
    let width = terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0));
    let width = width.saturating_sub(MARGIN + 1).clamp(16, MOST_CELLS / LINES);
    (if is_set("NO_COLOR") || is_dumb { Style::Plain } else { Style::Coloured }, width)
}

/// Shows the map of a `noun`, a disk or a base.
pub(super) fn show(global: &Global, noun: &str, name: &str, cells: Option<u32>) -> Result<(), CliError> {
    let (style, width) = of_stdout();
    let cells = cells.map_or(width * LINES, |cells| cells as usize);
    let path = format!("/v1/{noun}s/{name}/map?cells={cells}");
    let map = global.client()?.get(&path, &format!("cannot show the map of {noun} {name}"))?;
    global.output().value(&map, |map| draw(map, noun, style, width))
}

/// The map as text.
pub(super) fn draw(map: &Value, noun: &str, style: Style, width: usize) -> String {
    let number = |key: &str| map[key].as_u64().unwrap_or(0);
    let (size, cell_bytes) = (number("size"), number("cell_bytes").max(1));
    let mut out = format!("{noun} {}: {}", printable(map["name"].as_str().unwrap_or("-")), format_size(size));
    if let Some(base) = map["base"].as_str() {
        let _ = write!(out, ", base {}", printable(base));
    }
    if let Some(attached) = map["attached"].as_bool() {
        out.push_str(if attached { ", in use" } else { ", not in use" });
    }
    let _ = write!(out, "; one character is {}", format_size(cell_bytes));
    if map["exact"] == false {
        out.push_str("; approximate: a part of it was looked at");
    }
    out.push('\n');
    let columns = PLACES.map(|place| map[place.key].as_array().map_or(&[][..], Vec::as_slice));
    let count = columns.iter().map(|column| column.len()).max().unwrap_or(0);
    let at = |place: usize, cell: usize| columns[place].get(cell).and_then(Value::as_u64).unwrap_or(0);
    let cells: Vec<(usize, usize)> =
        (0..count).map(|cell| shown(&std::array::from_fn(|place| at(place, cell)))).collect();
    for (number, line) in (0..).zip(cells.chunks(width.max(1))) {
        let offset = (number * width) as u64 * cell_bytes;
        let _ = write!(out, "{:>width$} ", format_size(offset), width = MARGIN - 1);
        let mut colour = "";
        for (place, part) in line {
            let place = &PLACES[*place];
            if style == Style::Plain {
                out.push(place.letters[*part]);
                continue;
            }
            if colour != place.colour {
                colour = place.colour;
                let _ = write!(out, "\x1b[{colour}m");
            }
            out.push(place.blocks[*part]);
        }
        out.push_str(if colour.is_empty() { "\n" } else { "\x1b[0m\n" });
    }
    out + &legend(map, size, style)
}

/// The place that a cell shows, and whether it has that in part only (1) or mostly (0).
fn shown(bytes: &[u64; PLACES.len()]) -> (usize, usize) {
    let sum: u64 = bytes.iter().sum();
    if let Some(place) = (0..SHOWN_IN_PART).find(|place| bytes[*place] > 0) {
        return (place, usize::from(bytes[place] * 2 < sum));
    }
    let most = (0..PLACES.len()).rev().max_by_key(|place| bytes[*place]);
    (most.unwrap_or(PLACES.len() - 1), 0)
}

/// The characters, and the sums.
fn legend(map: &Value, size: u64, style: Style) -> String {
    let total = |key: &str| map["total"][key].as_u64().unwrap_or(0);
    let line = |mark: &str, name: &str, bytes: u64| {
        let percent = bytes as f64 * 100.0 / size.max(1) as f64;
        format!("{mark}  {name:<26}{:>10}  {percent:5.1} %\n", format_size(bytes))
    };
    let mut out = String::new();
    for (number, place) in PLACES.iter().enumerate().filter(|(_, place)| total(place.key) > 0) {
        let marks = if style == Style::Plain { place.letters } else { place.blocks };
        let some = if number < SHOWN_IN_PART { marks[1] } else { ' ' };
        let mark = match style {
            Style::Plain => format!("{}{some}", marks[0]),
            Style::Coloured => format!("\x1b[{}m{}{some}\x1b[0m", place.colour, marks[0]),
        };
        out += &line(&mark, place.name, total(place.key));
    }
    for (key, name) in OVERLAYS.iter().filter(|(key, _)| total(key) > 0) {
        out += &line("  ", name, total(key));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map() -> Value {
        json!({
            "name": "vm1", "base": "debian", "size": 4 << 20, "cell_bytes": 1 << 20, "exact": true, "attached": false,
            "delta": [1 << 20, 4096, 0, 0], "zero": [0, 0, 0, 1 << 20], "cached": [0, 0, 1 << 20, 0],
            "fetching": [0, 0, 0, 0], "local": [0, 0, 0, 0], "absent": [0, (1 << 20) - 4096, 0, 0],
            "unknown": [0, 0, 0, 0],
            "total": {"delta": (1 << 20) + 4096, "zero": 1 << 20, "cached": 1 << 20, "absent": (1 << 20) - 4096},
        })
    }

    #[test]
    fn a_plain_map_is_ascii_and_shows_parts_of_a_cell() {
        let text = draw(&map(), "disk", Style::Plain, 2);
        assert!(text.is_ascii(), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "disk vm1: 4M, base debian, not in use; one character is 1M");
        assert_eq!(lines[1].trim_start(), "0 Dd");
        assert_eq!(lines[2].trim_start(), "2M C.");
        assert!(lines[3].starts_with("Dd  delta"), "{text}");
        assert!(text.contains("25.0 %"), "{text}");
        assert!(!text.contains("unknown"), "{text}");
    }

    #[test]
    fn a_terminal_gets_blocks_and_colours_that_end_with_the_line() {
        let text = draw(&map(), "disk", Style::Coloured, 4);
        assert!(text.contains('█') && text.contains("\x1b[33m"), "{text}");
        for line in text.lines().filter(|line| line.contains("\x1b[")) {
            let (_, last) = line.rsplit_once("\x1b[").expect("an escape");
            assert!(last.starts_with("0m"), "{line:?}");
        }
    }

    #[test]
    fn an_answer_without_cells_is_drawn_too() {
        let text = draw(&json!({"name": "x"}), "base", Style::Plain, 8);
        assert_eq!(text, "base x: 0; one character is 1\n");
    }
}
