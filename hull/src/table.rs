//! Tables for people: columns as wide as their widest cell, two spaces between them.

use std::fmt;

use crate::streams;

/// A table of `N` columns.
#[derive(Debug)]
pub struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with nothing but its head.
    pub fn new(head: [&str; N]) -> Table<N> {
        Table { rows: vec![head.map(String::from)] }
    }

    /// Adds a row. Of its cells, control characters are shown and not obeyed.
    pub fn push(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| {
            let mut clean = String::with_capacity(cell.len());
            streams::push_printable(&mut clean, &cell, false);
            clean
        }));
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: [usize; N] = std::array::from_fn(|column| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        });
        for row in &self.rows {
            let cells: Vec<String> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let mut table = Table::new(["A", "LONG"]);
        table.push(["wide ä".into(), "x\u{1b}[2J".into()]);
        table.push(["b".into(), String::new()]);
        assert_eq!(table.to_string(), "A       LONG\nwide ä  x\\u{1b}[2J\nb\n");
    }
}
