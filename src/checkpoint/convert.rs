//! A checkpoint written anew with its weights rounded: a GGUF file, or a folder with safetensors. Tensor by tensor, so that no two
//! are in memory, and under its name only when it is complete and was read back.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::draft::{Draft, Output};
use super::folder::Folder;
use super::rounding::{Rounding, converted};
use super::tensor::{TensorInfo, bytes};
use super::{CONFIG, Checkpoint, GENERATION_CONFIG, Progress, SINGLE, TOKENIZER_FILES, TOKENIZER_JSON, gguf};
use crate::error::{Error, Result};
use crate::model::weights::is_harmless_extra;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rounded {
    /// Bytes of the tensors.
    pub bytes: u64,
    /// How many tensors are kept in which way, by its name.
    pub kept: BTreeMap<String, usize>,
}

/// Writes `checkpoint` with its matrices rounded to `out`, which must not exist: a file whose name ends with .gguf, or, in
/// two-byte formats, a folder as Hugging Face's libraries read it.
///
/// # Errors
/// [`Error::Invalid`] for an `out` that is neither, [`Error::Unsupported`] for a checkpoint that is quantised already, and
/// [`Error::Checkpoint`] if a file cannot be read or written, or a number not kept. Nothing is left under the name `out` then.
pub fn write_rounded(
    checkpoint: &Checkpoint,
    rounding: Rounding,
    out: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Rounded> {
    checkpoint.check_tensors()?;
    checkpoint.check_roundable()?;
    let is_file = out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if !is_file && !matches!(rounding, Rounding::Bf16 | Rounding::F16) {
        let what = format!("{}: {rounding} is written to files whose names end with .gguf", out.display());
        return Err(Error::invalid("out", what));
    }
    if is_file && gguf::is_part(out) {
        let what = format!("{} is named like one of several parts; models are written whole", out.display());
        return Err(Error::invalid("out", what));
    }
    let draft = Draft::new(out)?;
    let written = if is_file {
        gguf::write(checkpoint, rounding, draft.path(), progress)?;
        gguf::open(draft.path())?
    } else {
        write_folder(checkpoint, rounding, draft.path(), progress)?;
        Checkpoint::from_folder(checkpoint.name.clone(), &Folder::open(draft.path())?)?
    };
    // What cannot be read back must not take the name.
    written.check_tensors()?;
    written.tokenizer()?;
    draft.publish()?;
    let mut rounded = Rounded { bytes: 0, kept: BTreeMap::new() };
    for info in written.headers() {
        rounded.bytes += info.bytes;
        *rounded.kept.entry(info.storage.to_string()).or_default() += 1;
    }
    Ok(rounded)
}

fn write_folder(
    checkpoint: &Checkpoint,
    rounding: Rounding,
    folder: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    fs::create_dir(folder).map_err(|error| Error::file(folder, error))?;
    let write = |name: &str, bytes: &[u8]| -> Result<()> {
        let mut output = Output::create(&folder.join(name))?;
        output.write(bytes)?;
        output.finish()
    };
    write(CONFIG, config(checkpoint, rounding)?.as_bytes())?;
    for name in TOKENIZER_FILES.into_iter().chain([GENERATION_CONFIG]) {
        if let Some(bytes) = checkpoint.file(name)? {
            write(name, &bytes)?;
        }
    }
    if checkpoint.file(TOKENIZER_JSON)?.is_none() {
        // As it was read: other libraries convert tokenizer.model by rules of their own.
        write(TOKENIZER_JSON, checkpoint.tokenizer_json.as_bytes())?;
    }
    write_tensors(checkpoint, rounding, &folder.join(SINGLE), progress)
}

/// The source's config.json with the new type, and with the head that was put in.
fn config(checkpoint: &Checkpoint, rounding: Rounding) -> Result<String> {
    let Some(bytes) = checkpoint.file(CONFIG)? else {
        return Err(Error::Checkpoint(format!("{}: no {CONFIG}", checkpoint.name)));
    };
    let mut config: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| Error::Checkpoint(format!("{CONFIG}: {error}")))?;
    let dtype = if rounding == Rounding::F16 { "float16" } else { "bfloat16" };
    // transformers 5 writes `dtype`, transformers 4 `torch_dtype`.
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.to_owned(), dtype.into());
    // It names code that is not copied.
    config.remove("auto_map");
    if checkpoint.head.is_some() {
        config.insert("architectures".to_owned(), json!(["EurusRewardModel"]));
    }
    serde_json::to_string_pretty(&config).map_err(Error::internal)
}

fn write_tensors(
    checkpoint: &Checkpoint,
    rounding: Rounding,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    let to = rounding.main();
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    let infos = checkpoint.headers();
    for TensorInfo { name, shape, .. } in infos.iter().filter(|info| !is_harmless_extra(&info.name)) {
        let end = offset + bytes(&to, shape);
        let dtype = if rounding == Rounding::F16 { "F16" } else { "BF16" };
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_string(&header).map_err(Error::internal)?;
    // Spaces may follow the header; data begins at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut output = Output::create(path)?;
    output.write(&(header.len() as u64).to_le_bytes())?;
    output.write(header.as_bytes())?;
    checkpoint.visit(progress, &mut |info, data| converted(info, &data, &to, &mut |part| output.write(part)))?;
    output.finish()
}
