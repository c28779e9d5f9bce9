//! Which GGUF files of a folder or a repository make up the model that is meant: the only one, the one of a name, or the one whose
//! name ends with a quantisation, such as Q4_K_M.

use std::collections::BTreeMap;

use super::split_name;
use crate::error::{Error, Result};

const ENDING: &str = ".gguf";
/// Files of this form that are no models: projectors of images, and statistics for quantising.
const OTHERS: [&str; 2] = ["mmproj", "imatrix"];
/// Models that are listed in a message.
const SHOWN_MAX: usize = 20;

/// The files of one model, in order. `names` are paths below `place`, with `/` between folders.
///
/// # Errors
/// [`Error::NotFound`] if there is none, or parts are missing; [`Error::Invalid`] if several are meant.
pub(in crate::checkpoint) fn choose(names: &[String], wanted: Option<&str>, place: &str) -> Result<Vec<String>> {
    let models = models(names);
    let means = |(name, parts): &(&String, &Vec<String>)| match wanted {
        None => true,
        Some(wanted) if wanted.ends_with(ENDING) => parts.iter().any(|part| part == wanted),
        Some(wanted) => is_named(name, wanted),
    };
    let meant: Vec<_> = models.iter().filter(means).collect();
    let listed = || {
        let shown: Vec<&str> = models.keys().take(SHOWN_MAX).map(String::as_str).collect();
        let more = models.len().saturating_sub(SHOWN_MAX);
        shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
    };
    match (meant.as_slice(), wanted) {
        ([(_, parts)], _) => match parts.iter().find(|part| !names.contains(part)) {
            None => Ok((*parts).clone()),
            Some(missing) => Err(Error::NotFound(format!("{place}: {missing} is missing"))),
        },
        ([], _) if models.is_empty() => Err(Error::NotFound(format!("{place} has no GGUF files"))),
        ([], _) => {
            let wanted = wanted.unwrap_or_default();
            Err(Error::NotFound(format!("{place} has no GGUF model {wanted:?}; it has {}", listed())))
        }
        (_, None) => {
            let what = format!("{place} has several GGUF models; name one of its files: {}", listed());
            Err(Error::invalid("model", what))
        }
        (several, Some(wanted)) => {
            let several: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
            let what = format!("{place}: {wanted:?} may be any of {}; name the file", several.join(", "));
            Err(Error::invalid("model", what))
        }
    }
}

/// Models by name, and the files that each should have.
fn models(names: &[String]) -> BTreeMap<String, Vec<String>> {
    let mut models = BTreeMap::new();
    for name in names {
        let Some(stem) = name.strip_suffix(ENDING) else { continue };
        let file = stem.rsplit('/').next().unwrap_or(stem);
        if OTHERS.iter().any(|other| file.to_lowercase().starts_with(other)) {
            continue;
        }
        match split_name(stem) {
            Some((model, count)) => {
                let part = |index: usize| format!("{model}-{index:05}-of-{count:05}{ENDING}");
                // A count that lies is told by the file that is missing.
                models.insert(format!("{model}-*{ENDING}"), (1..=count.clamp(1, super::PARTS_MAX)).map(part).collect());
            }
            None => {
                models.insert(name.clone(), vec![name.clone()]);
            }
        }
    }
    models
}

/// Whether the model `name` ends with `wanted`, as a word of its own and in any case.
fn is_named(name: &str, wanted: &str) -> bool {
    let stem = name.trim_end_matches(ENDING).trim_end_matches("-*").to_lowercase();
    let rest = stem.strip_suffix(&wanted.to_lowercase());
    !wanted.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.ends_with(['-', '.', '_', '/']))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn chosen(names: &[&str], wanted: Option<&str>) -> Result<Vec<String>> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        choose(&names, wanted, "org/name")
    }

    #[test]
    fn the_one_that_is_meant_is_chosen() {
        let names = [
            "README.md",
            "m.Q4_K_M.gguf",
            "m.Q8_0.gguf",
            "big/m-f16-00002-of-00002.gguf",
            "big/m-f16-00001-of-00002.gguf",
            "mmproj-f16.gguf",
        ];
        let parts = ["big/m-f16-00001-of-00002.gguf", "big/m-f16-00002-of-00002.gguf"];
        for wanted in ["Q4_K_M", "q4_k_m", "m.Q4_K_M.gguf"] {
            assert_eq!(chosen(&names, Some(wanted)).unwrap(), ["m.Q4_K_M.gguf"], "{wanted}");
        }
        for wanted in ["F16", "m-f16", "big/m-f16-00002-of-00002.gguf"] {
            assert_eq!(chosen(&names, Some(wanted)).unwrap(), parts, "{wanted}");
        }
        assert_eq!(chosen(&["config.json", "x.gguf"], None).unwrap(), ["x.gguf"]);
        assert_eq!(chosen(&names[3..], None).unwrap(), parts);
    }

    #[test]
    fn what_is_not_clear_is_refused_with_the_choice() {
        let refused = |names: &[&str], wanted, part: &str| {
            let error = chosen(names, wanted).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let two = ["a.Q4_K_M.gguf", "b.Q4_K_M.gguf"];
        refused(&two, None, "several GGUF models; name one of its files: a.Q4_K_M.gguf, b.Q4_K_M.gguf");
        refused(&two, Some("Q4_K_M"), "may be any of a.Q4_K_M.gguf, b.Q4_K_M.gguf");
        // Not a word of its own.
        refused(&two, Some("K_M2"), "no GGUF model \"K_M2\"; it has a.Q4_K_M.gguf");
        refused(&two, Some("_M"), "no GGUF model");
        refused(&two, Some(""), "no GGUF model");
        refused(&["config.json"], None, "has no GGUF files");
        refused(&["x-00001-of-00003.gguf", "x-00003-of-00003.gguf"], None, "x-00002-of-00003.gguf is missing");
        let many: Vec<String> = (10..40).map(|i| format!("{i}.gguf")).collect();
        refused(&many.iter().map(String::as_str).collect::<Vec<_>>(), None, "29.gguf and 10 more");
    }
}
