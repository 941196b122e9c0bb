//! Sizes as people write them: `4096`, `64K`, `20G`, `1T`, always powers of 1024.
//!
//! The command line and the configuration file use the same parser, so both accept the same sizes with the same
//! meaning.

use thiserror::Error;

/// The largest accepted size in bytes. File offsets are signed 64-bit numbers.
pub const MAX_SIZE: u64 = i64::MAX as u64;

const UNITS: [(char, u32); 6] = [('E', 60), ('P', 50), ('T', 40), ('G', 30), ('M', 20), ('K', 10)];

/// Why a text is not a size. The message does not repeat the text; the caller names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// It is empty or white space.
    #[error("it is empty; give a number of bytes such as 4096, 64K, 20G or 1T")]
    Empty,
    /// It starts with a minus sign.
    #[error("it is negative; give a size of 0 or more")]
    Negative,
    /// It has a decimal point or comma.
    #[error("it is a fraction; give a whole number in a smaller unit, such as 1536M for 1.5G")]
    Fraction,
    /// It does not start with a digit.
    #[error("it is not a number; give a number of bytes such as 4096, 64K, 20G or 1T")]
    NotANumber,
    /// The text after the number is not a unit.
    #[error("its unit is not known; give K, M, G, T, P or E, powers of 1024")]
    Unit,
    /// It is 2^63 bytes or more.
    #[error("it is too large; give at most 9223372036854775807 bytes (below 8E)")]
    TooLarge,
}

/// Parses a size and returns it in bytes, at most [`MAX_SIZE`].
///
/// A size is digits and an optional unit `K`, `M`, `G`, `T`, `P` or `E` in either case, each with an optional `iB` or
/// `B`; a plain `B` is bytes. Zero is accepted; a caller that cannot use it refuses it itself.
///
/// # Errors
/// One [`SizeError`] per kind of mistake.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(SizeError::Empty);
    }
    if text.starts_with('-') {
        return Err(SizeError::Negative);
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if unit.starts_with(['.', ',']) {
        return Err(SizeError::Fraction);
    }
    if number.is_empty() {
        return Err(SizeError::NotANumber);
    }
    let shift = unit_shift(unit).ok_or(SizeError::Unit)?;
    // The text has digits only, so parsing fails only above 64 bits.
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
    let bytes = number.checked_mul(1 << shift).ok_or(SizeError::TooLarge)?;
    if bytes > MAX_SIZE {
        return Err(SizeError::TooLarge);
    }
    Ok(bytes)
}

fn unit_shift(unit: &str) -> Option<u32> {
    let mut rest = unit.chars();
    let Some(first) = rest.next() else {
        return Some(0);
    };
    let first = first.to_ascii_uppercase();
    let rest = rest.as_str();
    if first == 'B' {
        return rest.is_empty().then_some(0);
    }
    let &(_, shift) = UNITS.iter().find(|(letter, _)| *letter == first)?;
    (rest.is_empty() || rest.eq_ignore_ascii_case("ib") || rest.eq_ignore_ascii_case("b")).then_some(shift)
}

/// Formats a size for people: exact when it is a whole number of its unit (`20G`), otherwise rounded to one decimal
/// (`1.5G`), and in plain bytes below 1024.
pub fn format_size(bytes: u64) -> String {
    let Some(mut at) = UNITS.iter().position(|&(_, shift)| bytes >> shift != 0) else {
        return bytes.to_string();
    };
    if bytes.trailing_zeros() >= UNITS[at].1 {
        return format!("{}{}", bytes >> UNITS[at].1, UNITS[at].0);
    }
    // 1023.97K would be rounded to 1024.0K, which is 1.0M.
    let tenths = |shift: u32| ((u128::from(bytes) * 10 + (1 << (shift - 1))) >> shift) as u64;
    if at > 0 && tenths(UNITS[at].1) >= 10240 {
        at -= 1;
    }
    let (letter, shift) = UNITS[at];
    format!("{}.{}{letter}", tenths(shift) / 10, tenths(shift) % 10)
}
