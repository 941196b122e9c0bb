//! What the screen shows and what keys do. Knows no terminal, so that tests press the keys.

use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::Value;

use super::sample::Frame;
use super::{LONGEST, SHORTEST};
use crate::cli::error::CliError;
use crate::cli::listing::{Choice, Noun};
use crate::cli::output::Column;

/// A table of the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tab {
    Disks,
    Bases,
    Servers,
}

impl Tab {
    pub(super) const ALL: [Self; 3] = [Self::Disks, Self::Bases, Self::Servers];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Disks => "disks",
            Self::Bases => "bases",
            Self::Servers => "servers",
        }
    }
}

/// What follows a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    GoOn,
    Quit,
}

/// The state of one table.
struct TabState {
    choice: Choice,
    /// The first row of the screen.
    top: usize,
}

/// See the module.
pub(super) struct App {
    frame: Frame,
    /// Whether a frame has come.
    pub has_frame: bool,
    pub is_paused: bool,
    pub shows_help: bool,
    /// The text of a filter that is being typed.
    pub typed: Option<String>,
    /// Why there is no newer frame.
    pub error: Option<String>,
    tab: Tab,
    tabs: [TabState; 3],
    interval: u32,
    /// Rows that the screen has for the table, as of the last drawing.
    pub height: usize,
    /// The rows of the table as they are shown: filtered and sorted.
    rows: Vec<Value>,
}

impl App {
    pub(super) fn new(choice: Choice, interval: u32) -> Self {
        let of = |choice| TabState { choice, top: 0 };
        Self {
            frame: Frame::default(),
            has_frame: false,
            is_paused: false,
            shows_help: false,
            typed: None,
            error: None,
            tab: Tab::Disks,
            tabs: [of(choice), of(Choice::default()), of(Choice::default())],
            interval,
            height: 1,
            rows: Vec::new(),
        }
    }

    pub(super) fn frame(&self) -> &Frame {
        &self.frame
    }

    pub(super) fn tab(&self) -> Tab {
        self.tab
    }

    pub(super) fn interval(&self) -> u32 {
        self.interval
    }

    /// The rows of the table, filtered and sorted, and the number of the first one to show.
    pub(super) fn rows(&self) -> (&[Value], usize) {
        (&self.rows, self.state().top)
    }

    /// All rows of the table.
    pub(super) fn all(&self) -> &[Value] {
        match self.tab {
            Tab::Disks => &self.frame.disks,
            Tab::Bases => &self.frame.bases,
            Tab::Servers => &self.frame.servers,
        }
    }

    /// The column that the table is sorted by, and whether the largest comes first.
    pub(super) fn order(&self) -> Option<(Column, bool)> {
        self.state().choice.order(self.noun()).ok().flatten()
    }

    /// The filters of the table.
    pub(super) fn filters(&self) -> &[String] {
        self.state().choice.filters()
    }

    fn noun(&self) -> &'static Noun {
        self.tab.noun()
    }

    fn state(&self) -> &TabState {
        &self.tabs[self.tab as usize]
    }

    fn state_mut(&mut self) -> &mut TabState {
        &mut self.tabs[self.tab as usize]
    }

    /// Takes a frame or the reason why there is none. While the screen is paused it stays as it is.
    pub(super) fn take(&mut self, frame: Result<Frame, CliError>) {
        match frame {
            Err(error) => self.error = Some(error.to_string()),
            Ok(_) if self.is_paused => self.error = None,
            Ok(frame) => {
                (self.frame, self.has_frame, self.error) = (frame, true, None);
                self.choose();
            }
        }
    }

    fn choose(&mut self) {
        let all = self.all().to_vec();
        // The options were checked when they were taken.
        self.rows = self.state().choice.choose(all, self.noun()).unwrap_or_default();
        self.scroll(0);
    }

    fn scroll(&mut self, by: isize) {
        let most = self.rows.len().saturating_sub(self.height);
        let state = self.state_mut();
        state.top = state.top.saturating_add_signed(by).min(most);
    }

    /// The screen has a new height.
    pub(super) fn set_height(&mut self, height: usize) {
        self.height = height.max(1);
        self.scroll(0);
    }

    /// Does what a key or a change of the terminal asks for.
    pub(super) fn event(&mut self, event: &Event) -> Then {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => self.key(*key),
            _ => Then::GoOn,
        }
    }

    fn key(&mut self, key: KeyEvent) -> Then {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Then::Quit;
        }
        if self.typed.is_some() {
            self.type_filter(key.code);
            return Then::GoOn;
        }
        let page = isize::try_from(self.height).unwrap_or(isize::MAX);
        match key.code {
            KeyCode::Char('q') => return Then::Quit,
            KeyCode::Esc if self.shows_help => self.shows_help = false,
            KeyCode::Esc if !self.filters().is_empty() => self.set_filter(""),
            KeyCode::Esc => return Then::Quit,
            KeyCode::Char('?' | 'h') => self.shows_help = !self.shows_help,
            KeyCode::Char('p' | ' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('/') => self.typed = Some(String::new()),
            KeyCode::Char('>') => self.sort_by_next(1),
            KeyCode::Char('<') => self.sort_by_next(-1),
            KeyCode::Char('r') => self.turn_order(),
            KeyCode::Char('+') => self.interval = (self.interval + 1).min(LONGEST),
            KeyCode::Char('-') => self.interval = (self.interval - 1).max(SHORTEST),
            KeyCode::Tab => self.change_tab(1),
            KeyCode::BackTab => self.change_tab(Tab::ALL.len() - 1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll(1),
            KeyCode::Up | KeyCode::Char('k') => self.scroll(-1),
            KeyCode::PageDown => self.scroll(page),
            KeyCode::PageUp => self.scroll(-page),
            KeyCode::Home | KeyCode::Char('g') => self.scroll(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.scroll(isize::MAX),
            _ => {}
        }
        Then::GoOn
    }

    fn type_filter(&mut self, key: KeyCode) {
        let Some(text) = &mut self.typed else { return };
        match key {
            KeyCode::Char(c) => text.push(c),
            KeyCode::Backspace => drop(text.pop()),
            KeyCode::Esc => self.typed = None,
            KeyCode::Enter => {
                let text = self.typed.take().unwrap_or_default();
                self.set_filter(text.trim());
            }
            _ => {}
        }
    }

    /// Takes a filter: part of a name, or a column and a value. An empty one shows all rows.
    fn set_filter(&mut self, text: &str) {
        let noun = self.noun();
        let filter = match text {
            "" => Vec::new(),
            text if text.contains(['=', '~']) => vec![text.to_owned()],
            text => vec![format!("{}~{text}", noun.name)],
        };
        let choice = self.state().choice.with_filters(filter);
        match choice.check(noun) {
            Ok(()) => {
                let state = self.state_mut();
                (state.choice, state.top) = (choice, 0);
                self.error = None;
                self.choose();
            }
            Err(error) => self.error = Some(error.to_string()),
        }
    }

    /// Sorts by the column right of the present one, or left of it. Numbers begin with the largest.
    fn sort_by_next(&mut self, by: isize) {
        let noun = self.noun();
        let count = noun.columns.len() as isize;
        let now =
            self.order().and_then(|((_, key, _), _)| noun.columns.iter().position(|column| column.1 == key));
        let next = match now {
            Some(at) => (at as isize + by).rem_euclid(count),
            None if by > 0 => 0,
            None => count - 1,
        };
        let (_, key, kind) = noun.columns[next as usize];
        self.set_order(&format!("{key}{}", if kind.is_numeric() { ":desc" } else { "" }));
    }

    fn turn_order(&mut self) {
        if let Some(((_, key, _), is_descending)) = self.order() {
            self.set_order(&format!("{key}{}", if is_descending { "" } else { ":desc" }));
        }
    }

    fn set_order(&mut self, order: &str) {
        let state = self.state_mut();
        state.choice = state.choice.with_order(order);
        self.choose();
    }

    fn change_tab(&mut self, by: usize) {
        let at = (self.tab as usize + by) % Tab::ALL.len();
        self.tab = Tab::ALL[at];
        self.choose();
    }
}
