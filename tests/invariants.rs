//! Checks that docs and code agree: the code that upholds an invariant of docs/design.md or docs/format.md cites it, and
//! so does the test that guards it.
//!
//! A citation is the invariant's number as a word of a comment: `(D12)` behind the sentence that states it, and
//! `/// Guards D12.` above the test. In scripts, docstrings count as comments.

mod source_tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use source_tree::{Part, is_rust, parts, root, texts};

const DOCS: &[&str] = &["docs/design.md", "docs/format.md"];
const THIS: &str = "tests/invariants.rs";

/// An invariant's letter and number.
type Number = (char, u32);

/// All files that may cite an invariant.
fn sources() -> Vec<(String, String)> {
    let rust = ["src", "tests", "fuzz/src", "fuzz/tests"].into_iter().flat_map(|dir| texts(dir, is_rust));
    rust.chain(texts("scripts", |_| true)).filter(|(path, _)| path != THIS).collect()
}

fn is_test(path: &str) -> bool {
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
    path.starts_with("tests/")
        || path.contains("/tests/")
        || name == "tests.rs"
        || path.starts_with("src/simulation/")
        || path.starts_with("fuzz/")
        || dir == "scripts/isolation"
        || (dir == "scripts"
            && (name.contains("campaign") || ["kill-each", "bench-lazy", "bench-fleet"].contains(&name)))
}

/// The number of the invariant that a line of the docs defines, if it defines one.
fn defined(line: &str) -> Option<Number> {
    let (number, _) = line.strip_prefix("- ")?.split_once(' ')?;
    parse(number)
}

fn parse(word: &str) -> Option<Number> {
    let letter = word.chars().next().filter(|letter| matches!(letter, 'D' | 'H'))?;
    let digits = &word[1..];
    let is_number = (1..=3).contains(&digits.len())
        && !digits.starts_with('0')
        && digits.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| Some((letter, digits.parse().ok()?)))?
}

/// The numbers in a comment. A list that ends with dots cites none: `(D1, D2, ...)`.
fn cited(comment: &str) -> Vec<Number> {
    let is_word = |c: char| c.is_alphanumeric() || "_+-#./:&%\\".contains(c);
    let mut out = Vec::new();
    for part in comment.split(['(', ')']).filter(|part| !part.ends_with("...")) {
        for word in part.split(|c: char| !is_word(c)) {
            out.extend(parse(word.trim_end_matches(['.', ':', '-'])));
        }
    }
    out
}

/// The comments of Rust code, each with its line from 0.
fn rust_comments(text: &str) -> Vec<(usize, String)> {
    let line_of = |at: usize| text[..at].matches('\n').count();
    let comments = parts(text).into_iter().filter(|(part, _)| *part == Part::Comment);
    comments
        .map(|(_, range)| (line_of(range.start), text[range].trim_start_matches(['/', '!']).to_owned()))
        .collect()
}

/// The comments of a script, each with its line from 0: the text behind a `#` that begins a word, and docstrings.
fn script_comments(text: &str) -> Vec<(usize, String)> {
    let mut out = Vec::new();
    let mut in_docstring = false;
    for (number, line) in text.lines().enumerate() {
        let quotes = line.matches("\"\"\"").count();
        let begins = line.trim_start().starts_with("\"\"\"");
        if in_docstring || begins {
            out.push((number, line.to_owned()));
            in_docstring ^= quotes % 2 == 1;
        } else if let Some(comment) = line.strip_prefix('#').or(line.split_once(" #").map(|(_, rest)| rest)) {
            out.push((number, comment.to_owned()));
        }
    }
    out
}

/// The line from 0 at which the tests in a file of code begin.
fn tests_from(text: &str) -> usize {
    let lines: Vec<_> = text.lines().collect();
    let is_module = |line: &str| line.trim_start().starts_with("mod ") && line.ends_with('{');
    let begins = |pair: &[&str]| pair[0].trim() == "#[cfg(test)]" && is_module(pair[1]);
    lines.windows(2).position(begins).unwrap_or(usize::MAX)
}

/// The numbers that a file cites, each with its line from 1, and whether the citation is in a test.
fn citations(path: &str, text: &str) -> Vec<(Number, usize, bool)> {
    let comments = if is_rust(Path::new(path)) { rust_comments(text) } else { script_comments(text) };
    let tests = if is_test(path) { 0 } else { tests_from(text) };
    let all = comments.into_iter().flat_map(|(line, comment)| {
        cited(&comment).into_iter().map(move |number| (number, line + 1, line >= tests))
    });
    all.collect()
}

#[test]
fn each_invariant_is_cited_by_code_and_by_a_test() {
    let mut wrong = Vec::new();
    let mut invariants: BTreeMap<Number, String> = BTreeMap::new();
    for doc in DOCS {
        let text = fs::read_to_string(root().join(doc)).unwrap();
        for (line, number) in (1..).zip(text.lines().map(defined)) {
            let Some(number) = number else { continue };
            if let Some(before) = invariants.insert(number, format!("{doc}:{line}")) {
                wrong.push(format!("{doc}:{line}: {}{} is also defined at {before}", number.0, number.1));
            }
        }
    }
    assert!(invariants.len() > 50, "only {} invariants: the docs have another form", invariants.len());
    let (mut code, mut tests) = (BTreeSet::new(), BTreeSet::new());
    for (path, text) in sources() {
        for (number, line, in_test) in citations(&path, &text) {
            if invariants.contains_key(&number) {
                if in_test {
                    tests.insert(number)
                } else {
                    code.insert(number)
                };
            } else {
                wrong.push(format!("{path}:{line}: there is no invariant {}{}", number.0, number.1));
            }
        }
    }
    for (number @ (letter, n), place) in &invariants {
        if !code.contains(number) {
            wrong.push(format!(
                "{place}: no code cites {letter}{n}; cite it in the code that upholds it: ({letter}{n})"
            ));
        }
        if !tests.contains(number) {
            wrong.push(format!("{place}: no test cites {letter}{n}; cite it in the test that guards it: /// Guards {letter}{n}."));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_parser_finds_definitions_and_citations() {
    let definitions = ["- D7 The cache decides", "- D1, D2", "D8 A block", "- D 9", "- H10 URLs", "- Dx y"];
    let numbers: Vec<_> = definitions.into_iter().filter_map(defined).collect();
    assert_eq!(numbers, [('D', 7), ('H', 10)]);

    let text = r##"
        //! Held here (D1), and by D2: see (D3, H4). Not (D5, D6, ...), 0xD7, U+D800, XD9, D10x, D-11, D012, D1234.
        let s = "// (D13)"; let r = r#"(D14) " // D15"#; let c = '"'; // D16
        let h = 0xD17; // it's "D18
        fn l<'a>(x: &'a str) { y('\'') } /// Guards D19.
        #[cfg(test)]
        mod elsewhere;
        // D20
        #[cfg(test)]
        mod tests {
            /// Guards D21, H22.
        }
    "##;
    let seen = |path: &str, text: &str| {
        let all = citations(path, text).into_iter();
        all.map(|((letter, n), line, test)| format!("{letter}{n}:{line}{}", if test { "t" } else { "" }))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        seen("src/a.rs", text),
        ["D1:2", "D2:2", "D3:2", "H4:2", "D16:3", "D18:4", "D19:5", "D20:8", "D21:11t", "H22:11t"]
    );
    for path in ["src/a/tests.rs", "src/a/tests/b.rs", "tests/a.rs", "src/simulation/a.rs", "fuzz/src/a.rs"] {
        assert_eq!(seen(path, "// D1"), ["D1:1t"], "{path}");
    }

    let script = "#!/bin/sh\n\"\"\"Kills. Guards D1.\n\nAnd D2.\n\"\"\"\nx = \"D3\"  # D4\n# D5\ny = '#D6'\n";
    assert_eq!(seen("scripts/a", script), ["D1:2", "D2:4", "D4:6", "D5:7"]);
    for path in ["scripts/kill-each", "scripts/a-campaign", "scripts/bench-lazy", "scripts/isolation/a.py"] {
        assert_eq!(seen(path, "# D1"), ["D1:1t"], "{path}");
    }
}
